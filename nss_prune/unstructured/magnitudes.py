"""The magnitudes of one weight tensor, read block by block.

The bits of |w|, taken as an integer, are ordered like |w|. This integer is a weight's
*key*: comparing, counting and selecting by key is exact in every precision and copies
no more than one block of the tensor. A weight that is already masked has key -1, below
every magnitude. The work is done on the CPU, so that every device gives the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Keys = NDArray[np.signedinteger[Any]]


Counts = NDArray[np.int64]


Floats = NDArray[np.float64]

_BLOCK = 1 << 17  # weights read at once: what the processor's cache holds
_DIGITS = 15  # leading bits of a key that choose its bin
_KEY_TYPES = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}

_FLOAT_TYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}

SUPPORTED_TYPES = tuple(_KEY_TYPES)


@dataclass(frozen=True)
class Histogram:
    """Survivors counted by magnitude, largest first; empty bins are left out.

    Attributes:
        lowest: smallest key of each bin, `[bins]`.
        highest: largest key of each bin, `[bins]`.
        counts: survivors in each bin, `[bins]`.
    """

    lowest: Keys
    highest: Keys
    counts: Counts


@dataclass(frozen=True)
class Band:
    """The survivors whose keys lie between two bounds, largest first.

    Attributes:
        magnitudes: the distinct magnitudes, `[distinct]`.
        counts: how many survivors have each of them, `[distinct]`.
        energy_above: sum of w² of the survivors above the band.
    """

    magnitudes: Floats
    counts: Counts
    energy_above: float


class Magnitudes:
    """|w| of the surviving weights of one tensor.

    Args:
        weight: the tensor, `[rows, ...]`, finite, of one of `SUPPORTED_TYPES`.
        mask: True where a weight survives, shaped like `weight`; None where all do.
    """

    def __init__(self, weight: Tensor, mask: Tensor | None) -> None:
        self._weight = weight.detach()
        self._mask = mask
        self._key_type = _KEY_TYPES[weight.dtype]

    @cached_property
    def remaining(self) -> int:
        """Number of surviving weights."""
        if self._mask is None:
            return self._weight.numel()
        return int(torch.count_nonzero(self._mask))

    @property
    def nonzero(self) -> int:
        """Number of surviving weights that are not zero."""
        return sum(int(np.count_nonzero(keys > 0)) for _, keys in self.blocks())

    @cached_property
    def histogram(self) -> Histogram:
        """The survivors counted in up to 2^15 bins of (nearly) equal relative width."""
        shift = 8 * self._weight.element_size() - 1 - _DIGITS
        counts = np.zeros(2**_DIGITS + 1, dtype=np.int64)  # the first: masked weights
        for _, keys in self.blocks():
            counts += np.bincount((keys >> shift) + 1, minlength=len(counts))
        occupied = np.flatnonzero(counts[1:])[::-1]
        lowest = occupied.astype(np.int64) << shift
        return Histogram(lowest, lowest + ((1 << shift) - 1), counts[1:][occupied])

    def blocks(self, rows_together: int = 1) -> Iterator[tuple[slice, Keys]]:
        """The keys of a few rows at a time.

        Args:
            rows_together: every block but the last holds a multiple of so many rows.

        Yields:
            Which of the flattened weights they are, and their keys, `[weights]`.
        """
        rows = self._weight.shape[0]
        row_size = self._weight.numel() // rows
        step = max(1, _BLOCK // (row_size * rows_together)) * rows_together
        for start in range(0, rows, step):
            keys = self._keys(slice(start, start + step))
            yield slice(start * row_size, start * row_size + len(keys)), keys

    def _keys(self, rows: slice) -> Keys:
        bits = self._weight[rows].reshape(-1).cpu().view(self._key_type).numpy()
        keys: Keys = bits & np.iinfo(bits.dtype).max  # without the sign
        if self._mask is None:
            return keys
        return np.where(self._mask[rows].reshape(-1).cpu().numpy(), keys, bits.dtype.type(-1))

    def values(self, keys: Keys) -> Floats:
        """The magnitudes that have these keys, `[keys]`."""
        if self._weight.dtype == torch.bfloat16:  # the leading half of a float32
            return (keys.astype(np.int32) << 16).view(np.float32).astype(np.float64)
        bits = keys.astype(f"i{self._weight.element_size()}")
        return bits.view(_FLOAT_TYPES[self._weight.dtype]).astype(np.float64)

    def band(self, lowest: int, highest: int) -> Band:
        """The survivors with keys from `lowest` to `highest`, both included."""
        energy = 0.0
        for _, keys in self.blocks():
            above = self.values(np.where(keys > highest, keys, keys.dtype.type(0)))
            energy += float(np.square(above, out=above).sum())
        distinct, counts = np.unique(self._between(lowest, highest), return_counts=True)
        return Band(self.values(distinct[::-1]), counts[::-1].astype(np.int64), energy)

    def _between(self, lowest: int, highest: int) -> Keys:
        return np.concatenate(
            [keys[(keys >= lowest) & (keys <= highest)] for _, keys in self.blocks()]
        )

    def largest(self, count: int) -> Tensor:
        """Mask of the `count` largest survivors; of equal ones, the first by position.

        Args:
            count: from 0 to `remaining`.

        Returns:
            bool, shaped like the weight, on its device.
        """
        kept = np.full(self._weight.numel(), count > 0)
        if 0 < count < self._weight.numel():
            threshold, ties = self._threshold(count)
            for chosen, keys in self.blocks():
                kept[chosen] = keys > threshold
                equal = np.flatnonzero(keys == threshold)[:ties]
                kept[chosen][equal] = True
                ties -= len(equal)
        return self.as_mask(kept)

    def as_mask(self, kept: NDArray[np.bool_]) -> Tensor:
        """The flat array, `[weights]`, shaped, placed and laid out in memory like the weight."""
        mask = torch.from_numpy(kept).view(self._weight.shape).to(self._weight.device)
        if mask.stride() == self._weight.stride():
            return mask
        return torch.empty_like(self._weight, dtype=torch.bool).copy_(mask)

    def _threshold(self, count: int) -> tuple[int, int]:
        """The `count`-th largest key, and how many weights that have it are among the largest."""
        bins = self.histogram
        reached = np.cumsum(bins.counts)
        chosen = int(np.searchsorted(reached, count))
        wanted = count - int(reached[chosen] - bins.counts[chosen])
        candidates = self._between(int(bins.lowest[chosen]), int(bins.highest[chosen]))
        candidates.partition(len(candidates) - wanted)
        threshold = int(candidates[-wanted])
        return threshold, wanted - int(np.count_nonzero(candidates > threshold))
