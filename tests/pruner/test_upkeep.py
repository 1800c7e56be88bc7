"""Bounded memory in several passes, and runs that go on where they were broken off."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import Residual, assert_unchanged, batches, cnn, fingerprint, mlp, settled
from nss_prune import NSSPruner
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, DataError, FileFormatError, RemovalError
from nss_prune.statistics.consumers import ConsumerSums, consumer_statistics
from nss_prune.statistics.memory import mapped, parts_within
from nss_prune.statistics.moments import Moments

SAMPLES = 128


def made(make: Any) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    shape = {mlp: (12,), Residual: (6,)}.get(make, (3, 12, 12))
    data = batches(SAMPLES, shape, 3)
    return settled(make().double(), data[0][0]), data


class Counted(list[Any]):
    """Data that counts how many batches were read, and may fail at one."""

    def __init__(self, data: list[Any], fails_at: int | None = None) -> None:
        super().__init__(data)
        self.read = 0
        self.fails_at = fails_at

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if self.read == self.fails_at:
                raise FileNotFoundError("the disk is gone")
            self.read += 1
            yield batch


def pruned(make: Any, data: Any = None, **settings: Any) -> nn.Module:
    model, batches = made(make)
    given = batches if data is None else data
    NSSPruner(model, batches[0][0][:2], data=given, **settings).step()
    return model


def assert_same(one: nn.Module, other: nn.Module, *, exactly: bool = False) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        if exactly:
            assert torch.equal(value, second[name])
        else:
            torch.testing.assert_close(value, second[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [mlp, cnn, Residual])
@pytest.mark.parametrize(
    "settings",
    [{"params_budget": 0.6}, {"theta": 0.9}, {"params_budget": 0.6, "strategy": "semantic"}],
)
def test_a_limit_changes_the_passes_and_not_the_result(make, settings: dict[str, Any]) -> None:
    whole = Counted(made(make)[1])
    parts = Counted(whole)
    once = pruned(make, whole, **settings)
    assert_same(once, pruned(make, parts, memory_limit=2000, **settings))
    assert parts.read > whole.read


def test_an_iterator_that_would_be_read_several_times_is_refused() -> None:
    model, data = made(mlp)
    before = fingerprint(model)
    pruner = NSSPruner(model, data[0][0][:2], data=iter(data), params_budget=0.6, memory_limit=2000)
    with pytest.raises(DataError, match="raise memory_limit"):
        pruner.step()
    assert_unchanged(model, before)
    with pytest.raises(ArgumentError, match="above 0"):
        NSSPruner(model, data[0][0][:2], data=data, memory_limit=0)


def test_parts_keep_the_order_and_the_limit() -> None:
    sizes = [3, 4, 9, 1, 1, 1, 5]
    parts = parts_within(sizes, lambda size: size, 7)
    assert parts == [[3, 4], [9], [1, 1, 1], [5]]
    assert parts_within([], lambda size: size, 7) == []


def test_mapped_values_are_the_same_and_need_no_file_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    values = torch.randn(40, 30, dtype=torch.float64)
    assert torch.equal(mapped(values), values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("in_files", [False, True])
def test_sums_go_as_they_are_finished(in_files: bool, monkeypatch) -> None:
    model, data = made(cnn)
    sums = ConsumerSums(model, discover(model, data[0][0]).groups)
    with torch.no_grad():
        for inputs, _ in data:
            with sums.watching(len(inputs)):
                model(inputs)
    left = []
    finished = Moments.statistics

    def counted(self: Moments, *arguments: Any) -> Any:
        left.append(sum(one() is not None for one in living))
        return finished(self, *arguments)

    living = [weakref.ref(sums.moments(name)) for name in sums.consumers]
    monkeypatch.setattr(Moments, "statistics", counted)
    found = sums.statistics({}, in_files)
    assert left == list(range(len(living), 0, -1))
    expected = consumer_statistics(model, data, discover(model, data[0][0]).groups)
    for name, one in expected.items():
        torch.testing.assert_close(found[name].covariance, one.covariance)


SETTINGS = {"params_budget": 0.6, "recalibrate": True, "balance": True}


@pytest.mark.parametrize("limit", [2000, 2**30])
@pytest.mark.parametrize(
    "asked",
    [
        SETTINGS,
        {"theta": 0.9, "recalibrate": True, "balance": True},
        {"pruning_ratio": 0.4, "strategy": "category", "metric": "ens", "fold": "refit"},
    ],
)
def test_a_broken_run_goes_on_and_comes_to_the_same(
    asked: dict[str, Any], limit: int, tmp_path: Path
) -> None:
    settings = {**asked, "memory_limit": limit}
    unbroken = Counted(made(cnn)[1])
    expected = pruned(cnn, unbroken, **settings)
    folder = tmp_path / "sums"
    for fails_at in range(2 * unbroken.read // 3, unbroken.read, unbroken.read // 7):
        broken = Counted(unbroken, fails_at)
        with pytest.raises((FileNotFoundError, RemovalError)):
            pruned(cnn, broken, checkpoint=folder, **settings)
        assert list(folder.iterdir())
        resumed = Counted(unbroken)
        assert_same(expected, pruned(cnn, resumed, checkpoint=folder, **settings), exactly=True)
        assert resumed.read < unbroken.read
        assert not folder.exists()


def test_sums_of_another_model_or_question_are_not_taken(tmp_path: Path) -> None:
    _, data = made(cnn)
    with pytest.raises(FileNotFoundError):
        pruned(cnn, Counted(data, 30), checkpoint=tmp_path, **SETTINGS)
    kept = set(tmp_path.iterdir())
    assert kept
    expected = pruned(cnn, data, params_budget=0.6, fold=False)
    found = pruned(cnn, data, params_budget=0.6, fold=False, checkpoint=tmp_path)
    assert_same(expected, found, exactly=True)
    assert set(tmp_path.iterdir()) == kept


def test_a_damaged_file_is_named_and_the_model_intact(tmp_path: Path) -> None:
    model, data = made(cnn)
    with pytest.raises(FileNotFoundError):
        pruned(cnn, Counted(data, 30), checkpoint=tmp_path, **SETTINGS)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    before = fingerprint(model)
    pruner = NSSPruner(model, data[0][0][:2], data=data, checkpoint=tmp_path, **SETTINGS)
    with pytest.raises(FileFormatError, match=str(tmp_path)):
        pruner.step()
    assert_unchanged(model, before)
