"""Every strategy and repair in several processes: the result of one, and the same in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from networks import assert_unchanged, batches, fingerprint, mlp, settled
from nss_prune import NSSPruner, ReadaptTrainer, accuracy_on, profile
from nss_prune.errors import ArgumentError, DataError
from nss_prune.pruner.report import Report
from processes import in_processes

Batches = list[tuple[Tensor, Tensor]]

SAMPLES, SIZE = 176, 16  # 11 batches: shards of unequal length

BUDGET = {"params_budget": 0.6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp, theta": ("mlp", {"theta": 0.9}),
    "mlp, divergence": ("mlp", {**BUDGET}),
    "mlp, refit and balance": ("mlp", {**BUDGET, "fold": "refit", "balance": True}),
    "cnn, divergence, recalibration and balance": (
        "cnn",
        {"macs_budget": 0.6, "recalibrate": True, "balance": True},
    ),
    "cnn, category": ("cnn", {"pruning_ratio": 0.4, "strategy": "category"}),
    "cnn, global": ("cnn", {"pruning_ratio": 0.4, "strategy": "global", "fold": False}),
    "cnn, ratio": ("cnn", {"pruning_ratio": 0.4, "metric": "ens"}),
    "cnn, semantic budget and refit": ("cnn", {**BUDGET, "strategy": "semantic", "fold": "refit"}),
    "vit, divergence": ("vit", {"macs_budget": 0.7, "prune_head_dims": False}),
    "vit, heads": ("vit", {"macs_budget": 0.7}),
    "vit, theta": ("vit", {"theta": 0.9}),
    "mlp, max_divergence": ("mlp", {"max_divergence": 0.0005}),
    "cnn, score": ("cnn", {"max_drop": 5.0, "recalibrate": True}),
    "cnn, score, masked": ("cnn", {"min_score": 95.0, "cost": "parameters"}),
    "values": ("mlp", {**BUDGET, "outputs": "values"}),
    "steps": ("mlp", {**BUDGET, "iterative_steps": 2}),
}


def network(name: str) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    if name == "mlp":
        return mlp(), batches(SAMPLES, (12,), 3, size=SIZE)
    data = batches(SAMPLES, (3, 12, 12), 5, size=SIZE)
    if name == "vit":
        vit = timm.models.VisionTransformer(
            img_size=12, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5
        )
        return vit.double().eval(), data
    cnn = nn.Sequential(
        nn.Conv2d(3, 10, 3, bias=False), nn.BatchNorm2d(10), nn.ReLU(),
        nn.Conv2d(10, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    return settled(cnn.double(), data[0][0]), data


def pruned(case: str, rank: int = 0, number: int = 1) -> tuple[nn.Module, Report]:
    name, settings = CASES[case]
    model, data = network(name)
    shard = data[rank::number]
    if {"max_drop", "min_score"} & settings.keys():
        with torch.no_grad():
            own = [(inputs, model(inputs).argmax(1)) for inputs, _ in shard]
        settings = {**settings, "score": accuracy_on(own)}
    pruner = NSSPruner(model, data[0][0][:2], data=shard, **settings)
    for _ in range(settings.get("iterative_steps", 1)):
        pruner.step()
    assert pruner.report is not None
    return model, pruner.report


def prune_shard(rank: int, folder: str, number: int) -> None:
    found = {case: pruned(case, rank, number) for case in CASES}
    torch.save(found, f"{folder}/{number}-{rank}.pt")
    if number == 2:
        empty_shards(rank)
        failing_shards(rank)
        latency(rank, folder)
        padded(rank)
        sharded(rank, folder)


def padded(rank: int) -> None:
    """What a DistributedSampler repeats counts once."""
    model, data = network("mlp")
    inputs, labels = (torch.cat(parts)[:45] for parts in zip(*data, strict=True))
    dataset = TensorDataset(inputs, labels)
    loader = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, shuffle=False))
    assert profile(model, loader).used == 45
    NSSPruner(model, inputs[:2], params_budget=0.6, data=loader).step()
    whole, _ = network("mlp")
    odd = [(inputs[rank::2], labels[rank::2])]
    NSSPruner(whole, inputs[:2], params_budget=0.6, data=odd).step()
    for found, wanted in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def sharded(rank: int, folder: str) -> None:
    """Weights of which each process has a part: of tensor parallelism, and of FSDP2."""
    parallel, data = network("mlp")
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(parallel, mesh, {"1": ColwiseParallel()})
    models = [parallel]
    if hasattr(fsdp, "fully_shard"):  # since torch 2.6
        split, _ = network("mlp")
        models.append(fsdp.fully_shard(split, mesh=mesh))
    for model in models:
        with pytest.raises(ArgumentError, match="sharded"):
            profile(model, data, data[0][0][:2])
        with pytest.raises(ArgumentError, match="sharded"):
            ReadaptTrainer(model, None, train="all")
        with pytest.raises(ArgumentError) as refused:
            NSSPruner(model, data[0][0][:2], macs_budget=0.5, data=data)
    Path(f"{folder}/sharded").write_text(str(refused.value))


def empty_shards(rank: int) -> None:
    """All data in the second process: as if it were alone."""
    for case in ("cnn, divergence, recalibration and balance", "mlp, refit and balance", "values"):
        name, settings = CASES[case]
        model, data = network(name)
        NSSPruner(model, data[0][0][:2], data=data if rank else [], **settings).step()
        state = torch.cat([value.double().flatten() for value in model.state_dict().values()])
        both = [torch.empty_like(state) for _ in range(2)]
        torch.distributed.all_gather(both, state)
        assert torch.equal(*both)
    model, data = network("cnn")
    assert profile(model, data if rank else [], data[0][0][:2]).used == SAMPLES
    with pytest.raises(DataError, match="no batch"):
        NSSPruner(model, data[0][0][:2], macs_budget=0.5, data=[]).step()


class Failing(list[Any]):
    """Data whose last batch cannot be read, in the pass of that number."""

    def __init__(self, data: Batches, number: int) -> None:
        super().__init__(data)
        self.left = number

    def __iter__(self) -> Any:
        self.left -= 1
        yield from list(super().__iter__())[:-1]
        if not self.left:
            raise FileNotFoundError("the last picture is gone")
        yield self[-1]


def failing_shards(rank: int) -> None:
    """Whichever pass fails in one process, all raise the same, and the models are as before."""
    failed = 0
    for number in range(1, 40):
        model, data = network("cnn")
        before = fingerprint(model)
        given = Failing(data[rank:8:2], number if rank else 100)
        settings = {"macs_budget": 0.6, "recalibrate": True, "balance": True}
        pruner = NSSPruner(model, data[0][0][:2], data=given, **settings)
        error = ""
        try:
            pruner.step()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        everywhere: list[Any] = [None, None]
        torch.distributed.all_gather_object(everywhere, (error, given.left))
        errors, left = zip(*everywhere, strict=True)
        assert errors[0] == errors[1]
        if left[1] > 0:  # there are no more passes
            break
        if error:
            assert "the last picture is gone" in error
            assert_unchanged(model, before)
            failed += 1
    assert failed >= 6  # eliminations, effects, norms and classes before and after


def latency(rank: int, folder: str) -> None:
    """The first process times, and all keep the same neurons."""
    model, data = network("mlp")
    NSSPruner(model, data[0][0][:2], data=data[rank::2], latency_budget=0.7).step()
    torch.save(model.state_dict(), f"{folder}/latency-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    in_processes(prune_shard, folder, 2, number=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_prune_as_one(case: str, folder: Path) -> None:
    assert_as_one(case, folder, 2)


@pytest.mark.slow
def test_four_processes_prune_as_one(tmp_path: Path) -> None:
    in_processes(prune_shard, tmp_path, 4, number=4)
    for case in CASES:
        assert_as_one(case, tmp_path, 4)


def assert_as_one(case: str, folder: Path, number: int) -> None:
    one, report = pruned(case)
    found = [
        torch.load(folder / f"{number}-{rank}.pt", weights_only=False)[case]
        for rank in range(number)
    ]
    first = found[0][0].state_dict()
    for model, told in found:
        state = model.state_dict()
        assert state.keys() == first.keys()
        assert all(torch.equal(state[name], first[name]) for name in state)
        assert told.rows == report.rows
    for name, value in one.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-6, atol=1e-6)


def test_the_first_process_times_for_all(folder: Path) -> None:
    first, second = (torch.load(folder / f"latency-{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sharded_weights_are_refused(folder: Path) -> None:
    """Tested where there are processes: :func:`sharded`."""
    assert "full_state_dict" in (folder / "sharded").read_text()
