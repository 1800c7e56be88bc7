"""Random numbers that belong to a sample by its content, whatever batch and place it comes in.

What is drawn with them does not change when the data is shuffled or cut into other batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nss_prune.core.nested import tensors_in

AT_ONCE = 2**16  # values that a CPU mixes at a time: more of them leave its caches
_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed integer
_MIX = (-4658895280553007687, -7723592293110705685)  # Steele, Lea, Flood (2014), SplitMix64


class Draws:
    """Random numbers for each sample of a batch.

    Args:
        inputs: Of the batch, nested tensors with the samples along the first axis of the first.
        seed: Other seeds draw other numbers.

    Attributes:
        keys: One integer for each sample, int64 ``[samples]``, of the bits of its inputs.
    """

    def __init__(self, inputs: Any, seed: int = 0) -> None:
        tensors = tensors_in(inputs)
        samples = len(tensors[0])
        keys = torch.full((samples,), seed + 1, dtype=torch.int64, device=tensors[0].device)
        for tensor in tensors:
            if tensor.dim() and len(tensor) == samples:
                keys = _mixed(keys + _digest(tensor).to(keys.device))
        self.keys = keys

    def signs(self, like: Tensor, stream: int = 0) -> Tensor:
        """1 or -1 for every entry of ``[samples, ...]``, independent and equally likely.

        Args:
            stream: Others are independent of these.
        """
        bits = self._numbers(like[0].numel(), stream) >> 63
        return (2 * bits + 1).view(like.shape).to(like)

    def uniform(self, stream: int = 0) -> Tensor:
        """A number in [0, 1) for each sample, float64 ``[samples]``."""
        drawn = _mixed(self.keys + _GOLDEN * (stream + 1))
        return ((drawn >> 11) & (2**53 - 1)).double() / 2**53

    def _numbers(self, count: int, stream: int) -> Tensor:
        steps = torch.arange(1, count + 1, device=self.keys.device) * _GOLDEN
        return _mixed(_mixed(self.keys + stream)[:, None] + steps)


def _mixed(values: Tensor) -> Tensor:
    """Integers whose bits all depend on all bits of ``values``; products wrap around."""
    for shift, factor in zip((30, 27), _MIX, strict=True):
        values = (values ^ _shifted(values, shift)) * factor
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, count: int) -> Tensor:
    """A logical shift to the right: torch's keeps the sign."""
    return (values >> count) & ((1 << (64 - count)) - 1)


def _digest(tensor: Tensor) -> Tensor:
    """One integer for the bits of each sample, int64 ``[samples]``."""
    flat = tensor.detach().reshape(len(tensor), -1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    if flat.is_floating_point():
        exact = flat if flat.dtype == torch.float64 else flat.float()
        flat = exact.view(torch.int64 if exact.dtype == torch.float64 else torch.int32)
    places = torch.arange(1, flat.shape[1] + 1, device=flat.device) * _GOLDEN
    size = max(1, (AT_ONCE if flat.device.type == "cpu" else flat.numel()) // len(flat))
    parts = zip(flat.split(size, 1), places.split(size), strict=True)
    return torch.stack([_mixed(part.long() + place).sum(1) for part, place in parts]).sum(0)
