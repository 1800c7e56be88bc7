"""Nested slices from the whole model to the least, and the smallest of them that passes a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from nss_prune.allocation.budget import TOLERANCE, Limits, Ranked, ShareOf
from nss_prune.allocation.divergence import ALLOCATIONS, costs_at, scores
from nss_prune.allocation.elimination import Elimination
from nss_prune.allocation.interactions import Predictor
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice

STEPS = round(1 / TOLERANCE)  # sizes of a path that are told apart


class Path:
    """Slices without the first neuron of an order, the first two, ...

    What adds least divergence for each unit of cost goes first, as in
    :func:`nss_prune.allocation.divergence.allocate`.

    Args:
        found: Layer -> its elimination; layers without one are left alone.
        share: The share of the cost that a slice keeps.
        limits: What every slice keeps.
        at: The slice whose neurons' costs count; the whole model by default.
    """

    def __init__(
        self,
        groups: tuple[NeuronGroup, ...],
        found: Mapping[str, Elimination],
        share: ShareOf,
        limits: Limits,
        at: Slice | None = None,
    ) -> None:
        found = {group.name: found[group.name] for group in groups if group.name in found}
        values = scores(groups, found, costs_at(whole(groups) if at is None else at, found, share))
        self.groups = groups
        self._ranked = Ranked(groups, values.__getitem__, limits)
        self._share = share
        self._shares: dict[int, float] = {}

    @property
    def last(self) -> int:
        """Neurons that go at most, apart from the limits."""
        return len(self._ranked.owners)

    def slice(self, count: int) -> Slice:
        """What is kept after ``count`` neurons."""
        return self._ranked.without(count)

    def share(self, count: int) -> float:
        """The share of the cost that it keeps."""
        if count not in self._shares:
            self._shares[count] = self._share(self.slice(count))
        return self._shares[count]

    def within(self, share: float) -> int:
        """The first slice that keeps at most this share of the cost; the last where none does."""
        fewest, most = 0, self.last
        while fewest < most:
            middle = (fewest + most) // 2
            if self.share(middle) <= share:
                most = middle
            else:
                fewest = middle + 1
        return fewest

    def divergence(self, predictor: Predictor, counts: Sequence[int] | None = None) -> Tensor:
        """Predicted, in nats a sample, ``[counts]``; after each neuron by default."""
        wanted = torch.arange(self.last + 1) if counts is None else torch.as_tensor(counts)
        return predictor.divergence(self._ranked.gone_after(wanted))


def whole(groups: tuple[NeuronGroup, ...]) -> Slice:
    """The slice that keeps all neurons."""
    return Slice({group.name: torch.ones(group.size).bool() for group in groups}, groups)


def within_divergence(
    groups: tuple[NeuronGroup, ...],
    found: Mapping[str, Elimination],
    predictor: Predictor,
    most: float,
    share: ShareOf,
    limits: Limits,
) -> Slice:
    """The smallest slice whose predicted divergence is at most ``most`` nats a sample.

    What a neuron costs depends on how many are left around it: the costs are those at the last
    solution, and the smallest of some rounds is taken, as in
    :func:`nss_prune.allocation.divergence.allocate`.
    """
    current: Slice | None = None
    solutions: list[tuple[float, int, Slice]] = []
    for _ in range(ALLOCATIONS):
        path = Path(groups, found, share, limits, current)
        passing = (path.divergence(predictor) <= most).nonzero().flatten().tolist()
        # A slice may keep a neuron more than its count says, so that each consumer has one.
        smallest = next(n for n in reversed(passing) if predictor.of(path.slice(n)) <= most)
        current = path.slice(smallest)
        solutions.append((path.share(smallest), len(solutions), current))
    return min(solutions, key=lambda solution: solution[:2])[2]


def smallest_passing(path: Path, passes: Callable[[Slice], bool]) -> Slice:
    """The smallest slice of a path that passes a test, by bisection; each is tested once.

    Sizes differ by a hundredth of the cost. The whole model passes untested, and every slice is
    taken to pass that is larger than one that does.
    """
    tested = {0: True}

    def holds(step: int) -> bool:
        count = path.within(1 - step / STEPS)
        if count not in tested:
            tested[count] = passes(path.slice(count))
        return tested[count]

    passing, failing = 0, STEPS + 1
    while failing - passing > 1:
        middle = (passing + failing) // 2
        if holds(middle):
            passing = middle
        else:
            failing = middle
    return path.slice(path.within(1 - passing / STEPS))
