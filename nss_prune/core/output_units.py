"""What a pass over the outputs adds up to: the variance of values, and what each output tells.

What an output tells is the divergence that losing it would cost, the mean over samples of the KL
divergence of its distribution from the one of all samples together. Outputs are made commensurable
by it: nats of a confident head, of an undecided one and of a thousand pixels are not.
"""

from __future__ import annotations

import copy
import functools
import operator
from typing import TypeVar

import torch
from torch import Tensor

from nss_prune.core.processes import gathered, processes

Sums = TypeVar("Sums", bound="Spread | Chances")


def over_processes(sums: Sums) -> Sums:
    """What the outputs in all processes add up to."""
    if processes() == 1:
        return sums
    local = copy.copy(sums)
    vars(local).update(
        (name, value.cpu()) for name, value in vars(sums).items() if isinstance(value, Tensor)
    )
    return functools.reduce(operator.add, gathered(local))


class Spread:
    """Mean and variance of a stream of ``[samples, positions, size]``, around its first batch."""

    def __init__(self) -> None:
        self.samples = self.count = 0
        self.epsilon = 0.0
        self.shift = self.total = self.squares = torch.zeros(())

    def add(self, entries: Tensor) -> None:
        """Add a batch."""
        self.epsilon = max(self.epsilon, torch.finfo(entries.dtype).eps)
        values = entries.flatten(0, 1).double()
        if not self.count:
            self.shift = values.mean(0)
            self.total = self.squares = torch.zeros_like(self.shift)
        centred = values - self.shift
        self.samples += len(entries)
        self.count += len(values)
        self.total = self.total + centred.sum(0)
        self.squares = self.squares + centred.square().sum(0)

    def __add__(self, other: Spread) -> Spread:
        if not self.count or not other.count:
            return self if self.count else other
        found = copy.copy(self)
        offset = other.shift - self.shift
        found.total = self.total + other.total + other.count * offset
        moved = other.squares + 2 * offset * other.total + other.count * offset**2
        found.squares = self.squares + moved
        found.samples = self.samples + other.samples
        found.count = self.count + other.count
        found.epsilon = max(self.epsilon, other.epsilon)
        return found

    def is_finite(self) -> bool:
        """Whether no value was NaN or infinite."""
        return bool(torch.isfinite(self.squares.sum()))

    def mean(self) -> Tensor:
        """Of each channel, float64 ``[size]``."""
        return self.shift + self.total / self.count

    def _variance(self) -> Tensor:
        """Of each channel, unbiased; 0 where it is no more than the rounding of the values."""
        variance = (self.squares - self.total**2 / self.count) / max(1, self.count - 1)
        size = self.mean().abs() + variance.clamp(min=0).sqrt()
        return variance.masked_fill(variance <= (8 * self.epsilon * size) ** 2, 0.0)

    def variance(self) -> Tensor:
        """Of each channel, unbiased, float64 ``[size]``; 1 of one that does not vary."""
        variance = self._variance()
        return variance.masked_fill(variance == 0, 1.0)

    def information(self) -> float:
        """Half the channels that vary, for every position: what the mean in their place costs."""
        return self.count / self.samples * int((self._variance() > 0).sum()) / 2


class Chances:
    """Probabilities of a stream of scores ``[samples, positions, size]``."""

    def __init__(self, softmax: bool) -> None:
        self.softmax = softmax
        self.samples = self.count = 0
        self.total = self.entropy = torch.zeros(())

    def add(self, entries: Tensor) -> None:
        """Add a batch."""
        scores = entries.double()
        chances = scores.softmax(-1) if self.softmax else scores.sigmoid()
        self.samples += len(entries)
        self.count += entries.shape[0] * entries.shape[1]
        self.total = self.total + chances.sum((0, 1))
        self.entropy = self.entropy + self._entropy(chances)

    def __add__(self, other: Chances) -> Chances:
        found = copy.copy(self)
        for name in ("samples", "count", "total", "entropy"):
            setattr(found, name, getattr(self, name) + getattr(other, name))
        return found

    def is_finite(self) -> bool:
        """Whether no score was NaN."""
        return bool(torch.isfinite(self.entropy))

    def _entropy(self, chances: Tensor) -> Tensor:
        found: Tensor = torch.special.entr(chances).sum()
        return found if self.softmax else found + torch.special.entr(1 - chances).sum()

    def information(self) -> float:
        """Mean over samples of Σ KL(p ‖ p̄) over positions, where p̄ is the mean of all, in nats."""
        known = self.count * self._entropy(self.total / self.count) - self.entropy
        return max(0.0, float(known)) / self.samples
