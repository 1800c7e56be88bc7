"""No sample vanishes: those without a label, the negatives of binary labels, and those ignored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_streaming import same
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from networks import mlp
from nss_prune import NSSPruner, Profile, profile
from nss_prune.errors import DataError
from nss_prune.profiling.categories import members

INPUTS = torch.randn(60, 12, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return mlp(classes=4)


def rows() -> Tensor:
    """Several labels for a sample; 20 samples have none."""
    labels = torch.zeros(60, 4)
    labels[:40] = (torch.rand(40, 4, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    labels[:40, 0] = torch.maximum(labels[:40, 0], 1 - labels[:40].amax(1))
    return labels


def as_lists(found: dict[int, Tensor]) -> dict[int, list[int]]:
    return {category: indices.tolist() for category, indices in found.items()}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_rows_without_a_label_are_a_category(dtype: torch.dtype) -> None:
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]]).to(dtype)
    assert as_lists(members(labels, 4)) == {0: [0], 2: [0, 2], -1: [1, 3]}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("shape", [(5, 1), (5,)])
def test_binary_labels_are_two_categories(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    labels = torch.tensor([0, 1, 1, 0, 1]).to(dtype).reshape(shape)
    assert as_lists(members(labels, 5)) == {0: [0, 3], 1: [1, 2, 4]}


def test_other_integers_and_what_is_no_label() -> None:
    column = torch.tensor([[7], [3], [7]])
    assert as_lists(members(column, 3)) == as_lists(members(column[:, 0], 3)) == {3: [1], 7: [0, 2]}
    assert as_lists(members(torch.tensor([2, -100, 2]), 3)) == {2: [0, 2]}
    assert members(torch.tensor([-100, -100]), 2) == {}
    for wrong in (torch.tensor([0.0, 0.5]), torch.tensor([[0, 2], [1, 1]]), torch.zeros(3)):
        with pytest.raises(DataError, match="one integer"):
            members(wrong, 2)


@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_profile_counts_them(model, size: int) -> None:
    labels = rows()
    found = profile(model, list(zip(INPUTS.split(size), labels.split(size), strict=True)))
    assert found.categories == ((-1,), (0,), (1,), (2,), (3,))
    assert found.samples == (20, *labels.sum(0).int().tolist())
    assert (found.used, found.unused) == (60, 0)
    assert any("without a label" in note and "20 samples" in note for note in found.notes)
    alone = profile(model, [(INPUTS[40:], labels[40:])])
    for name in found.layers:
        torch.testing.assert_close(
            found.curves["taylor"][name][0], alone.curves["taylor"][name][0], rtol=0, atol=1e-12
        )


def test_few_without_a_label_join_and_the_note_says_whom(model) -> None:
    labels = torch.cat([torch.eye(4).repeat(14, 1), torch.zeros(4, 4)])
    found = profile(model, [(INPUTS, labels)])
    assert found.categories == ((-1, 0), (1,), (2,), (3,))
    assert any("without a label" in note and "together with 0" in note for note in found.notes)


def test_negatives_of_one_logit_count() -> None:
    torch.manual_seed(0)
    labels = (torch.arange(60) % 3 == 0).float()[:, None]
    found = profile(mlp(classes=1), [(INPUTS, labels.double())])
    assert found.categories == ((0,), (1,))
    assert found.samples == (40, 20)


def test_ignored_samples_are_not_used_and_the_report_says_so(model, tmp_path: Path) -> None:
    labels = torch.arange(60) % 4
    labels[::6] = -100
    used = labels != -100
    data = list(zip(INPUTS.split(9), labels.split(9), strict=True))
    found = profile(model, data)
    assert (found.used, found.unused) == (50, 10)
    assert any("50 of 60" in note and "-100" in note for note in found.notes)
    same(found, profile(model, [(INPUTS[used], labels[used])]))
    loader = DataLoader(TensorDataset(INPUTS, labels), batch_size=9)
    for limit in (2**30, 12 * (16**2 + 11**2)):  # one pass; the order of the categories
        for given in (data, loader):
            again = profile(model, given, memory_limit=limit)
            same(found, again)
            assert (again.used, again.unused) == (50, 10)
    pruner = NSSPruner(model, INPUTS[:1], data=data, strategy="semantic", theta=0.9)
    pruner.step()
    assert any("50 of 60" in note for note in pruner.report.notes)


def test_merged_and_loaded_they_are_still_counted(model, tmp_path: Path) -> None:
    labels = rows()
    shards = [
        profile(model, [(INPUTS[part], labels[part])], keep_statistics=True)
        for part in (slice(0, 45), slice(45, 60))
    ]
    shards[0].save(tmp_path / "shard.safetensors", statistics=True)
    shards[0] = Profile.load(tmp_path / "shard.safetensors")
    assert (shards[0].used, shards[0].unused) == (45, 0)
    merged = Profile.merge(shards)
    whole = profile(model, [(INPUTS, labels)])
    same(merged, whole)
    assert merged.notes == whole.notes
    assert (merged.used, merged.unused) == (60, 0)
