"""Bounded memory, category order, several passes and several processes: always the same sums."""

from __future__ import annotations

import copy
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Subset, TensorDataset

from networks import batches, cnn, mlp
from nss_prune import Profile
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError
from nss_prune import profile
from nss_prune.profiling.streaming import dataset_labels

ROOM_FOR_ONE = 12 * (16**2 + 11**2)  # bytes that one category of mlp() takes
METRICS = ("taylor", "avg", "var", "ens")


def same(first: Profile, second: Profile) -> None:
    assert first.categories == second.categories
    assert first.samples == second.samples
    for metric in first.metrics:
        for name in first.layers:
            for values in ("contributions", "overall", "curves"):
                torch.testing.assert_close(
                    getattr(first, values)[metric][name],
                    getattr(second, values)[metric][name],
                    rtol=1e-9,
                    atol=1e-12,
                )
    for theta in (0.8, 0.95):
        kept = first.slice(theta).kept
        assert all(torch.equal(kept[name], mask) for name, mask in second.slice(theta).kept.items())


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """60 samples of 7 categories; two of them are small."""
    ((inputs, _),) = batches(60, (12,), 3, size=60)
    labels = torch.tensor([0, 1, 2, 3, 4] * 10 + [5] * 6 + [6] * 4)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    return list(zip(inputs[order].split(7), labels[order].split(7), strict=True))


@pytest.fixture
def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return mlp(classes=7)


@pytest.mark.parametrize("room", [1, 2, 3, 6])
def test_several_passes_give_what_one_gives(model, data, room: int) -> None:
    one = profile(model, data, metrics=METRICS)
    several = profile(model, data, metrics=METRICS, memory_limit=room * ROOM_FOR_ONE)
    same(one, several)
    assert one.categories == ((0,), (1,), (2,), (3,), (4,), (5, 6))
    assert one.notes == several.notes != ()


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("shuffle", [False, True])
def test_order_of_categories_gives_the_same(model, data, room: int, shuffle: bool) -> None:
    dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    loader = DataLoader(dataset, batch_size=9, shuffle=shuffle)
    one = profile(model, data, metrics=METRICS)
    same(one, profile(model, loader, metrics=METRICS, memory_limit=room * ROOM_FOR_ONE))
    same(one, profile(model, loader, metrics=METRICS))


def test_order_of_categories_reads_every_sample_once(model, data) -> None:
    class Counting(TensorDataset):
        def __init__(self, *tensors: torch.Tensor) -> None:
            super().__init__(*tensors)
            self.read: list[int] = []

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            self.read.append(index)
            return super().__getitem__(index)

    dataset = Counting(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    loader = DataLoader(dataset, batch_size=9)
    profile(model, loader, torch.zeros(2, 12).double(), memory_limit=ROOM_FOR_ONE)
    assert sorted(dataset.read) == list(range(60))
    labels = [int(dataset.tensors[1][index]) for index in dataset.read]
    parts = [min(label, 5) for label in labels]  # 5 and 6 are small and count as one
    assert parts == sorted(parts)


def test_labels_are_found_where_data_sets_keep_them() -> None:
    inputs, labels = torch.zeros(4, 2), torch.tensor([3, 1, 2, 0])
    dataset = TensorDataset(inputs, labels)
    assert dataset_labels(dataset) == [3, 1, 2, 0]
    assert dataset_labels(Subset(dataset, [2, 0])) == [2, 3]
    assert dataset_labels(TensorDataset(labels, inputs)) is None


def test_a_stream_with_too_many_categories_says_what_to_do(model, data) -> None:
    with pytest.raises(DataError, match="memory_limit"):
        profile(model, iter(data), memory_limit=ROOM_FOR_ONE)
    with pytest.raises(DataError, match="memory_limit"):
        profile(model, data, categories=lambda x, y, out: y, memory_limit=ROOM_FOR_ONE)
    same(profile(model, iter(data)), profile(model, data))


def test_merged_shards_give_the_whole(model, data) -> None:
    whole = profile(model, data, metrics=METRICS)
    shards = [
        profile(model, shard, metrics=METRICS, keep_statistics=True)
        for shard in (data[:3], data[3:5], data[5:])
    ]
    merged = Profile.merge(shards)
    same(whole, merged)
    same(whole, Profile.merge([Profile.merge(shards[:2]), shards[2]]))


def test_merge_refuses_what_does_not_fit(model, data) -> None:
    with_sums = profile(model, data, keep_statistics=True)
    with pytest.raises(ArgumentError, match="at least one"):
        Profile.merge([])
    with pytest.raises(ArgumentError, match="keep_statistics"):
        Profile.merge([with_sums, profile(model, data)])
    pooled = profile(model, data, features="pooled", keep_statistics=True)
    with pytest.raises(ModelMismatchError, match="same model"):
        Profile.merge([with_sums, pooled])


def test_several_labels_for_a_sample(model, data) -> None:
    inputs = torch.cat([inputs for inputs, _ in data])
    labels = torch.rand(60, 7, generator=torch.Generator().manual_seed(1)) < 0.4
    many = profile(model, [(inputs, labels.long())])
    assert many.samples == tuple(labels.sum(0).tolist())

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), reduction="sum"
        )

    only = labels[:, 2]
    alone = profile(model, [(inputs[only], labels[only].long())], categories=None, loss=loss)
    for name in many.layers:
        torch.testing.assert_close(
            many.curves["taylor"][name][2], alone.curves["taylor"][name][0], rtol=1e-9, atol=1e-12
        )
    same(many, profile(model, [(inputs, labels.long())], memory_limit=2 * ROOM_FOR_ONE))


def test_dense_targets_by_a_function() -> None:
    torch.manual_seed(0)
    model = cnn()[:6].append(torch.nn.Conv2d(10, 4, 1)).double().eval()
    inputs = torch.randn(20, 3, 8, 8).double()
    labels = torch.randint(0, 4, (20, 2, 2))

    def present(x: torch.Tensor, y: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([(y == c).flatten(1).any(1) for c in range(4)], dim=1)

    result = profile(model, [(inputs, labels)], categories=present)
    assert result.samples == tuple(int((labels == c).flatten(1).any(1).sum()) for c in range(4))


def shard_profile(rank: int, world: int, folder: str, room: int) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    model, dataset = torch.load(f"{folder}/input.pt", weights_only=False)
    shard = Subset(dataset, list(range(rank, len(dataset), world)))
    result = profile(
        model,
        DataLoader(shard, batch_size=8),
        metrics=METRICS,
        memory_limit=room * ROOM_FOR_ONE,
    )
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("room", [10, 1])
def test_two_processes_agree_with_one(model, data, tmp_path: Path, room: int) -> None:
    dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    torch.save((copy.deepcopy(model), dataset), tmp_path / "input.pt")
    mp.spawn(shard_profile, args=(2, str(tmp_path), room), nprocs=2)
    one = profile(model, data, metrics=METRICS)
    for rank in range(2):
        same(one, torch.load(tmp_path / f"{rank}.pt", weights_only=False))
