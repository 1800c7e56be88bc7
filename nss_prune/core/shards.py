"""The share of the data that a process reads, each sample counted once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler
from torch.utils.data.distributed import DistributedSampler


def without_padding(data: Iterable[Any]) -> Iterable[Any]:
    """The same without the samples that a DistributedSampler repeats to make shards equally long.

    A loader or sampler of a class of one's own is taken as it is; let its sampler drop the last
    samples, or leave the repeated ones out.
    """
    if type(data) is not DataLoader or type(data.batch_sampler) is not BatchSampler:
        return data
    sampler = data.batch_sampler.sampler
    if not isinstance(sampler, DistributedSampler) or not _repeats(sampler):
        return data
    own = BatchSampler(_Unpadded(sampler), data.batch_sampler.batch_size, data.drop_last)
    names = (
        "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn",
        "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers",
        "pin_memory_device",
    )  # fmt: skip
    settings = {name: getattr(data, name) for name in names}
    return DataLoader(data.dataset, batch_sampler=own, **settings)


def _repeats(sampler: DistributedSampler[Any]) -> bool:
    """Whether the last sample of this shard is one that another shard has as well.

    Samples go to the shards in turn, and those beyond the length of the data set are the first ones
    again: at most one in each shard.
    """
    last = (sampler.num_samples - 1) * sampler.num_replicas + sampler.rank
    size = len(sampler.dataset)  # type: ignore[arg-type]
    return not sampler.drop_last and last >= size


class _Unpadded(Sampler[int]):
    """The indices of a sampler but the last."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler) - 1

    def __iter__(self) -> Iterator[int]:
        indices: list[int] = list(self.sampler)
        return iter(indices[:-1])
