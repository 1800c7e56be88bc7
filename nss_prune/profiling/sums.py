"""The sums of one category, over batches and processes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from nss_prune.core.processes import processes
from nss_prune.profiling.similarity import LandscapeSums


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

    def tensors(self) -> list[Tensor]:
        """Every tensor of the sums, in an order that depends on the groups and metrics alone."""
        found = []
        for sums in self.groups.values():
            found += [sums.landscape.matrix, sums.landscape.total, *sums.statistics.values()]
        return found


def total_sums(sums: CategorySums) -> CategorySums:
    """The sums over all processes, in place. Every process must call it in the same order."""
    if processes() == 1:
        return sums
    tensors = sums.tensors()
    landscapes = [group.landscape for group in sums.groups.values()]
    rows = torch.tensor([sums.samples, *(landscape.rows for landscape in landscapes)])
    packed = torch.cat([rows.to(tensors[0]), *(tensor.flatten() for tensor in tensors)])
    dist.all_reduce(packed)
    sums.samples, *counted = (int(value) for value in packed[: len(rows)].round())
    for landscape, count in zip(landscapes, counted, strict=True):
        landscape.rows = count
    pieces = packed[len(rows) :].split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view_as(tensor))
    return sums
