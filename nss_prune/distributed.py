"""Sums over the processes of torch.distributed; with one process, nothing happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist

from nss_prune.collector import CategorySums


def processes() -> int:
    """How many processes share the data."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total_counts(counts: Mapping[int, int]) -> dict[int, int]:
    """Category -> samples over all processes."""
    if processes() == 1:
        return dict(counts)
    everywhere: list[Mapping[int, int]] = [{}] * processes()
    dist.all_gather_object(everywhere, dict(counts))
    total: Counter[int] = Counter()
    for local in everywhere:
        total.update(local)
    return dict(total)


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
