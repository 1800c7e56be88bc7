"""How much the parts of a model's outputs tell of a sample, so that several count alike.

A nat of a softmax and a squared error do not compare. What a part tells is the divergence of what
it says of a sample from what it says on average: the mutual information of sample and prediction
for classes and labels, half the number of entries for values in units of their variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nss_prune.core.batches import as_computed
from nss_prune.core.output_parts import Part

LEAST = 1e-6  # of the largest: a part that tells less than this is not made to count alike


def spreads(parts: Sequence[Part], batches: Iterable[Sequence[Tensor]]) -> list[float]:
    """Mean divergence of each part from its average, in nats a sample.

    Args:
        batches: The tensors of the parts, of every batch.
    """
    sums = [_Spread(part) for part in parts]
    for tensors in batches:
        for spread, tensor in zip(sums, tensors, strict=True):
            spread.add(tensor)
    return [spread.value for spread in sums]


def equal_weights(found: Sequence[float]) -> list[float]:
    """Weights by which parts of these spreads count alike, in units of the first."""
    least = LEAST * max(found)
    first = max(found[0], least)
    return [first / value if value > least else 1.0 for value in found]


class _Spread:
    """Σ p log p and Σ p of one part, over samples and positions."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._samples = self._places = 0
        self._negative_entropy = 0.0
        self._total: Tensor | None = None

    def add(self, tensor: Tensor) -> None:
        entries = self.part.arranged(as_computed(tensor.detach())).double()
        self._samples += len(entries)
        self._places += entries.shape[0] * entries.shape[1]
        if self.part.kind == "values":
            return
        chances = _chances(self.part, entries)
        self._negative_entropy += float(torch.special.xlogy(chances, chances).sum())
        total = chances.sum((0, 1))
        self._total = total if self._total is None else self._total + total

    @property
    def value(self) -> float:
        """In nats a sample."""
        if self.part.kind == "values":
            return self.part.size * self._places / self._samples / 2
        assert self._total is not None
        average = self._total / self._places
        expected = self._places * float(torch.special.xlogy(average, average).sum())
        return max(0.0, (self._negative_entropy - expected) / self._samples)


def _chances(part: Part, entries: Tensor) -> Tensor:
    """Of all that can be drawn, ``[samples, positions, size]`` or twice the size."""
    if part.kind == "classes":
        return entries.softmax(-1)
    return torch.cat([entries.sigmoid(), (-entries).sigmoid()], -1)
