"""The sums of one category, over batches and processes."""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nss_prune.core.processes import gathered, processes, summed, total_by_key
from nss_prune.errors import DataError
from nss_prune.profiling.similarity import LandscapeSums
from nss_prune.statistics.covariance import add_over_processes


@dataclass
class GroupSums:
    """Sums of one category of one group.

    Attributes:
        landscape: For the kernel.
        statistics: metric -> Σ over samples, float64 ``[statistics, neurons]``.
    """

    landscape: LandscapeSums
    statistics: dict[str, Tensor]

    def __add__(self, other: GroupSums) -> GroupSums:
        return GroupSums(
            self.landscape + other.landscape,
            {name: values + other.statistics[name] for name, values in self.statistics.items()},
        )


@dataclass
class CategorySums:
    """Sums of one category.

    Attributes:
        samples: Number of samples.
        groups: Layer -> its sums.
    """

    samples: int = 0
    groups: dict[str, GroupSums] = field(default_factory=dict)

    def __add__(self, other: CategorySums) -> CategorySums:
        return CategorySums(
            self.samples + other.samples,
            {name: sums + other.groups[name] for name, sums in self.groups.items()},
        )

    def clear(self) -> CategorySums:
        """The same sums, with nothing added to them."""
        self.samples = 0
        for sums in self.groups.values():
            sums.landscape.clear()
            for values in sums.statistics.values():
                values.zero_()
        return self


def draw_within(sums: Collection[CategorySums], limit: float) -> None:
    """Keep an even draw of the samples where kept activations take more than ``limit`` bytes.

    Every category gets the same share.

    Raises:
        DataError: There is no room for two samples of each category.
    """
    kept = [
        [group.landscape.drawn for group in category.groups.values() if group.landscape.drawn]
        for category in sums
    ]
    kept = [drawn for drawn in kept if drawn]
    taken = sum(each.bytes_per_sample * len(each.keys) for drawn in kept for each in drawn)
    if taken <= limit:
        return
    per_sample = max(sum(each.bytes_per_sample for each in drawn) for drawn in kept)
    room = int(limit / (per_sample * len(kept)))
    if room < 2:
        raise DataError(
            f"memory_limit has room for {room} sample(s) of each of {len(kept)} categories: with "
            f"features='flat' the activations of a sample take {per_sample:,} bytes; raise "
            "memory_limit, ignore layers, or use features='pixel' or 'pooled'"
        )
    for drawn in kept:
        for each in drawn:
            each.keep(room)


def total_sums(sums: CategorySums) -> CategorySums:
    """The sums over all processes, in place. Every process must call it in the same order."""
    if processes() == 1:
        return sums
    sums.samples = total_by_key({0: sums.samples})[0]
    groups = list(sums.groups.values())
    summed([value for group in groups for value in group.statistics.values()])
    add_over_processes([group.landscape.covariance for group in groups])
    _gather_drawn([group.landscape for group in groups])
    return sums


def _gather_drawn(landscapes: Sequence[LandscapeSums]) -> None:
    """Give every process the activations that all of them kept."""
    local = [each.drawn and each.drawn.to("cpu") for each in landscapes]
    for landscape, found in zip(landscapes, zip(*gathered(local), strict=True), strict=True):
        present = [drawn for drawn in found if drawn is not None]
        if present:
            home = landscape.covariance.mean.device
            landscape.drawn = functools.reduce(operator.add, present).to(home)
