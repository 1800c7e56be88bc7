"""Which positions of a map are sampled."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly_spaced(available: int, wanted: int) -> Tensor:
    """``wanted`` of the positions 0 .. available - 1, each in the middle of its share."""
    return ((torch.arange(wanted, dtype=torch.float64) + 0.5) * available / wanted).long()
