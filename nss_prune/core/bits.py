"""Boolean tensors packed to one bit each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def pack(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Eight weights to a byte, the first in the lowest bit: uint8 `[ceil(weights / 8)]`."""
    return {
        name: torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None, bitorder="little"))
        for name, mask in masks.items()
    }


def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The inverse of :func:`pack`."""
    return {
        name: torch.from_numpy(
            np.unpackbits(packed[name].numpy(), count=math.prod(shape), bitorder="little")
        )
        .view(torch.bool)
        .view(shape)
        for name, shape in shapes.items()
    }
