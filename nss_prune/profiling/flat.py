"""Activations of whole samples, for landscapes that have the positions as features (Eq. 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nss_prune.errors import DataError

GOLDEN = (5**0.5 - 1) / 2
BLOCK = 2**24  # numbers of the Gram matrices that are worked on at a time: 64 MiB in float32


class DrawnSamples:
    """Activations of the samples of a category: all of them, or a drawn subset.

    The n-th sample has the key n·φ mod 1 (the golden ratio's Weyl sequence, which spreads evenly
    over [0, 1) and has no period), and is kept while its key is below a threshold. To lower the
    threshold, at any time, leaves samples from all over the stream, the same for every size of
    the batches; those of shards are merged under the lower of their thresholds.

    Attributes:
        seen: Number of samples added.
        threshold: Samples with keys below are kept; above 1 all are.
        keys: Of the samples kept, float64 ``[kept]``.
    """

    def __init__(self) -> None:
        self.seen = 0
        self.threshold = 2.0
        self.keys = torch.zeros(0, dtype=torch.float64)
        self._values: list[Tensor] = []

    @classmethod
    def of(cls, seen: int, threshold: float, keys: Tensor, values: Tensor) -> DrawnSamples:
        """What was kept of ``seen`` samples, values ``[neurons, kept, features]``."""
        found = cls()
        found.seen, found.threshold, found.keys, found._values = seen, threshold, keys, [values]
        return found

    @property
    def values(self) -> Tensor:
        """Activations of the samples kept, ``[neurons, kept, features]``."""
        if len(self._values) > 1:
            self._values = [torch.cat(self._values, dim=1)]
        return self._values[0]

    @property
    def bytes_per_sample(self) -> int:
        """Bytes that the activations of one sample take."""
        neurons, _, features = self._values[0].shape
        return neurons * features * self._values[0].element_size()

    def to(self, device: torch.device | str) -> DrawnSamples:
        """The same with the activations on another device."""
        return DrawnSamples.of(self.seen, self.threshold, self.keys, self.values.to(device))

    def add(self, observed: Sequence[Tensor]) -> None:
        """Add samples, from each of their consumers ``[neurons, samples, positions]``.

        Raises:
            DataError: They have other positions than the samples before.
        """
        values = observed[0] if len(observed) == 1 else torch.cat(list(observed), dim=2)
        self._check(values)
        order = torch.arange(self.seen, self.seen + values.shape[1], dtype=torch.float64)
        self.seen += len(order)
        self._append((order + 1) * GOLDEN % 1, values)

    def keep(self, samples: int) -> None:
        """Lower the threshold until at most ``samples`` samples are kept."""
        if len(self.keys) > samples:
            self._lower(float(self.keys.sort().values[samples]))

    def __add__(self, other: DrawnSamples) -> DrawnSamples:
        total = DrawnSamples()
        total.threshold = min(self.threshold, other.threshold)
        for each in (self, other):
            if each._values:
                total._check(each.values)
                total._append(each.keys, each.values)
        total.seen = self.seen + other.seen
        return total

    def kernel(self, centered: bool) -> Tensor:
        """K[a, b] = <M_a, M_b> over all pairs of the samples kept, float64 ``[neurons, neurons]``.

        Args:
            centered: Subtract the mean of the samples from every feature first.
        """
        values = self.values
        if centered:
            # Twice: the first mean is rounded to the precision of the values.
            values = values - values.mean(1, keepdim=True)
            values = values - values.mean(1, keepdim=True)
        return landscape_kernel(values)

    def _check(self, values: Tensor) -> None:
        if self._values and values.shape[2] != self._values[0].shape[2]:
            raise DataError(
                "features='flat' compares samples position by position, but some have "
                f"{self._values[0].shape[2]} positions and others {values.shape[2]}; give inputs "
                "of one size, or features='pixel' or 'pooled'"
            )

    def _append(self, keys: Tensor, values: Tensor) -> None:
        kept = (keys < self.threshold).nonzero().flatten()
        self.keys = torch.cat([self.keys, keys[kept]])
        self._values.append(_picked(values, kept))

    def _lower(self, threshold: float) -> None:
        self.threshold = threshold
        parts = self.keys.split([values.shape[1] for values in self._values])
        kept = [(keys < threshold).nonzero().flatten() for keys in parts]
        self._values = [_picked(*pair) for pair in zip(self._values, kept, strict=True)]
        self.keys = self.keys[self.keys < threshold]


def _picked(values: Tensor, samples: Tensor) -> Tensor:
    if len(samples) == values.shape[1]:
        return values
    return values.index_select(1, samples.to(values.device))


def landscape_kernel(values: Tensor) -> Tensor:
    """K[a, b] = <X_a X_aᵀ, X_b X_bᵀ> of activations ``[neurons, samples, features]``."""
    neurons, samples, features = values.shape
    kernel = torch.zeros(neurons, neurons, dtype=torch.float64, device=values.device)
    if features**2 < samples:
        # It is ‖X_aᵀ X_b‖² as well: fewer numbers than the Gram matrices have.
        rows = values.transpose(1, 2).reshape(neurons * features, samples)
        step = max(1, BLOCK // (neurons * features**2))
        for part, block in zip(kernel.split(step), rows.split(step * features), strict=True):
            squares = (block @ rows.T).double().square_()
            part.copy_(squares.view(len(part), features, neurons, features).sum((1, 3)))
        return kernel
    step = max(1, BLOCK // (neurons * samples))
    for block in values.split(step, dim=1):
        grams = (block @ values.transpose(1, 2)).flatten(1)
        kernel += grams @ grams.T
    return kernel
