"""A DistributedSampler's padding is left out; everything else stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from nss_prune.core.shards import without_padding
from nss_prune.core.views import Views


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("size", "replicas"), [(10, 3), (9, 3), (2, 4), (11, 4), (1, 1)])
def test_each_sample_is_in_one_shard(size: int, replicas: int, shuffle: bool) -> None:
    dataset = TensorDataset(torch.arange(size))
    seen = []
    for rank in range(replicas):
        sampler = DistributedSampler(dataset, replicas, rank, shuffle=shuffle)
        loader = without_padding(DataLoader(dataset, batch_size=3, sampler=sampler))
        for _ in range(2):  # as often as asked
            shard = [int(sample) for (batch,) in loader for sample in batch]
        seen += shard
    assert sorted(seen) == list(range(size))


def test_views_are_made_of_the_samples_left() -> None:
    dataset = TensorDataset(torch.arange(5.0))
    sampler = DistributedSampler(dataset, 2, 1, shuffle=False)
    data = Views(DataLoader(dataset, batch_size=2, sampler=sampler), lambda batch: -batch)
    found = [inputs.tolist() for inputs, _ in without_padding(data)]
    assert found == [[1, -1, 3, -3]]


def test_other_data_is_taken_as_it_is() -> None:
    dataset = TensorDataset(torch.arange(5.0))
    dropping = DistributedSampler(dataset, 2, 1, drop_last=True)
    for data in (
        [torch.zeros(2)],
        DataLoader(dataset, batch_size=2, shuffle=True),
        DataLoader(dataset, batch_size=2, sampler=dropping),
        DataLoader(dataset, batch_size=None),
    ):
        assert without_padding(data) is data
