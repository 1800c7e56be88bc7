"""Boolean tensors packed to one bit each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nss_prune.core.schema import array, check_tensor, table, whole

SHAPES = table(array(whole(), most=16))
"""Of the shapes of packed tensors in the notes of a file."""

BitOrder = Literal["little", "big"]
"""Whether the first of eight entries is in the lowest or in the highest bit of a byte."""


def pack(masks: Mapping[str, Tensor], order: BitOrder = "little") -> dict[str, Tensor]:
    """Eight entries to a byte, row by row: bool of any shape -> uint8 `[ceil(entries / 8)]`."""
    return {
        name: torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=None, bitorder=order))
        for name, mask in masks.items()
    }


def unpack(
    packed: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    order: BitOrder = "little",
) -> dict[str, Tensor]:
    """The inverse of :func:`pack`.

    Raises:
        FileFormatError: There are more or fewer bits than a shape needs.
    """
    for name, shape in shapes.items():
        check_tensor(name, packed[name], (-(-math.prod(shape) // 8),), (torch.uint8,))
    return {
        name: torch.from_numpy(
            np.unpackbits(packed[name].numpy(), count=math.prod(shape), bitorder=order)
        )
        .view(torch.bool)
        .view(tuple(shape))
        for name, shape in shapes.items()
    }
