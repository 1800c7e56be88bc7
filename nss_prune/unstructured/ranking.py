"""The best weights over all layers, for scores that fall with the rank inside a layer.

Inside a layer such a score orders the weights by magnitude, so that the best weights are
given by one number per layer: how many of its largest to keep. The search needs no sort
of all weights: histograms bound every score, only the few weights whose bounds straddle
the threshold are read in full, and the threshold is bisected over them in float64.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from nss_prune.unstructured.magnitudes import Counts, Floats, Magnitudes
from nss_prune.unstructured.weights import Layer

Score = Callable[[Floats, Floats], Floats]
"""(magnitude, energy) -> score, where energy is the sum of w² of the layer's weights that
are not smaller, the weight itself included. Rises with the first, falls with the second."""

_SLACK = 1e-9  # bounds are sums in another order than the scores they bound
_INFINITY = int(np.float64(np.inf).view(np.int64))


def best(layers: Sequence[Layer], keep: int, score: Score) -> list[int]:
    """How many of its largest weights each layer keeps, if the best over all layers stay.

    Equal weights of a layer rank by position; equal scores of layers by order of layers.

    Args:
        layers: the layers, in order.
        keep: how many weights to keep in all, from 0 to what remains.
        score: rises with magnitude and falls with energy.

    Returns:
        `[layers]`, summing to `keep`.
    """
    if keep == 0:
        return [0] * len(layers)
    bounds = [_Bounds(layer.magnitudes, score) for layer in layers]
    counts = np.concatenate([bound.counts for bound in bounds])
    floor = _weighted_kth(np.concatenate([bound.lower for bound in bounds]), counts, keep)
    ceiling = _weighted_kth(np.concatenate([bound.upper for bound in bounds]), counts, keep)
    queues = [
        _Queue(layer.magnitudes, bound, floor, ceiling, score)
        for layer, bound in zip(layers, bounds, strict=True)
    ]

    def too_few(bits: int) -> bool:
        return sum(queue.passing(_as_float(bits)) for queue in queues) < keep

    threshold = bisect_left(range(_INFINITY), True, key=too_few) - 1
    budgets = [queue.passing(_as_float(threshold)) for queue in queues]
    certain = [queue.passing(_as_float(threshold + 1)) for queue in queues]
    return _drop_surplus(budgets, certain, sum(budgets) - keep)


class _Bounds:
    """Bounds on the scores of the weights in each bin of a layer, `[bins]`, best first."""

    def __init__(self, magnitudes: Magnitudes, score: Score) -> None:
        bins = magnitudes.histogram
        self.counts = bins.counts
        lowest, highest = magnitudes.values(bins.lowest), magnitudes.values(bins.highest)
        least, most = bins.counts * lowest**2, bins.counts * highest**2
        least_above = np.cumsum(least) - least
        self.lower = score(lowest, np.cumsum(most)) * (1 - _SLACK)
        self.upper = score(highest, least_above + lowest**2) * (1 + _SLACK)


class _Queue:
    """The weights of a layer, best first; only those that the bounds leave open are read."""

    def __init__(
        self, magnitudes: Magnitudes, bounds: _Bounds, floor: float, ceiling: float, score: Score
    ) -> None:
        bins = magnitudes.histogram
        start = int(np.count_nonzero(bounds.lower > ceiling))
        stop = int(np.count_nonzero(bounds.upper >= floor))
        self._score = score
        self._ahead = int(bins.counts[:start].sum())
        self._counts = np.zeros(0, dtype=np.int64)
        self._magnitudes = self._negative_last = np.zeros(0)
        if start < stop:
            self._read(magnitudes, int(bins.lowest[stop - 1]), int(bins.highest[start]))

    def _read(self, magnitudes: Magnitudes, lowest: int, highest: int) -> None:
        band = magnitudes.band(lowest, highest)
        self._counts, self._magnitudes = band.counts, band.magnitudes
        squares = band.counts * band.magnitudes**2
        self._energy = np.cumsum(np.concatenate([[band.energy_above], squares]))
        self._reached = np.concatenate([[0], np.cumsum(band.counts)])
        self._negative_last = -self._score(band.magnitudes, self._energy[1:])

    def passing(self, threshold: float) -> int:
        """How many weights of the layer have at least this score."""
        if not len(self._counts):
            return self._ahead
        whole = int(np.searchsorted(self._negative_last, -threshold, side="right"))
        passing = self._ahead + int(self._reached[whole])
        if whole < len(self._counts) and self._counts[whole] > 1:
            passing += self._passing_of_equals(whole, threshold)
        return passing

    def _passing_of_equals(self, index: int, threshold: float) -> int:
        magnitude, before = self._magnitudes[index], self._energy[index]

        def negative_score(rank: int) -> float:
            return -float(self._score(magnitude, before + rank * magnitude**2))

        ranks = range(1, int(self._counts[index]))  # the last is known not to pass
        return bisect_right(ranks, -threshold, key=negative_score)


def _weighted_kth(values: Floats, counts: Counts, rank: int) -> float:
    """The `rank`-th largest of values that occur `counts` times each."""
    order = np.argsort(-values, kind="stable")
    return float(values[order[np.searchsorted(np.cumsum(counts[order]), rank)]])


def _as_float(bits: int) -> float:
    """The float64 with these bits; positive floats are ordered like their bits."""
    return float(np.int64(bits).view(np.float64))


def _drop_surplus(budgets: list[int], certain: list[int], surplus: int) -> list[int]:
    """Take from the last layers first what ties with the threshold beyond the total."""
    for index in reversed(range(len(budgets))):
        dropped = min(surplus, budgets[index] - certain[index])
        budgets[index] -= dropped
        surplus -= dropped
    return budgets
