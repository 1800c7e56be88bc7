"""Views add samples, but what is estimated knows which of them are of the same one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import hflip

from networks import batches, cnn, settled
from nss_prune import NSSPruner, Views, profile
from nss_prune.balance import class_shares
from nss_prune.discovery import discover
from nss_prune.divergence import eliminations
from nss_prune.errors import ArgumentError, DataError
from nss_prune.folding import refit
from nss_prune.readers import reader_statistics
from nss_prune.slicing import Slice
from nss_prune.views import views_of

SHAPE = (3, 12, 12)


def same(inputs: Tensor) -> Tensor:
    return inputs.clone()


def fresh(inputs: Tensor) -> Tensor:
    return torch.randn_like(inputs)


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    """Pictures whose positions resemble each other, so that they are worth fewer than there are."""
    torch.manual_seed(2)
    return [
        (inputs + 2 * torch.randn(len(inputs), 3, 1, 1).double(), labels)
        for inputs, labels in batches(200, SHAPE, 3)
    ]


@pytest.fixture
def model(data) -> nn.Module:
    torch.manual_seed(0)
    return settled(cnn(), data[0][0])


def test_the_views_of_a_sample_follow_each_other() -> None:
    inputs, labels = torch.randn(5, 3, 4, 4), torch.arange(5)
    views = Views(DataLoader(TensorDataset(inputs, labels), 2), hflip, torch.neg)
    assert (len(views), views_of(views), views_of([])) == (3, 3, 1)
    for _ in range(2):
        shown, named = (torch.cat(parts) for parts in zip(*views, strict=True))
        assert torch.equal(named, labels.repeat_interleave(3))
        for start, expected in enumerate((inputs, inputs.flip(3), -inputs)):
            assert torch.equal(shown[start::3], expected)


def test_inputs_may_be_nested_and_labels_missing() -> None:
    first, second = torch.randn(4, 2), torch.randn(4, 3)

    def negative(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: -tensor for name, tensor in inputs.items()}

    ((shown, labels),) = Views([{"a": first, "b": second}], negative)
    assert labels is None
    for name, tensor in (("a", first), ("b", second)):
        assert torch.equal(shown[name][::2], tensor)
        assert torch.equal(shown[name][1::2], -tensor)


def test_what_cannot_be_viewed(data) -> None:
    with pytest.raises(ArgumentError, match="no transform"):
        Views(data)
    with pytest.raises(ArgumentError, match="only once"):
        Views(iter(data), hflip)
    with pytest.raises(DataError, match="keep the shapes"):
        next(iter(Views(data, lambda inputs: inputs[..., :4])))


def test_a_copy_of_each_sample_says_nothing_more(model, data) -> None:
    groups = discover(model, data[0][0]).groups
    once = reader_statistics(model, data, groups)
    twice = reader_statistics(model, Views(data, same), groups)
    for name, found in once.items():
        copied = twice[name]
        assert copied.samples == 2 * found.samples
        assert copied.observations == pytest.approx(found.observations, rel=1e-9)
        torch.testing.assert_close(copied.covariance, found.covariance)


def test_views_that_have_nothing_in_common_are_samples(model, data) -> None:
    groups = discover(model, data[0][0]).groups
    once = reader_statistics(model, data, groups)
    torch.manual_seed(1)
    more = reader_statistics(model, Views(data, fresh), groups)
    for name, found in once.items():
        assert more[name].observations > 1.7 * found.observations


def test_a_flattened_map_counts_its_samples_once(data) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 100, 2)).double()
    groups = discover(model, data[0][0]).groups
    once, twice = (
        reader_statistics(model, seen, groups)["2"].by_neuron(100)
        for seen in (data, Views(data, same))
    )
    assert twice.observations == pytest.approx(once.observations, rel=1e-9)


def test_copies_do_not_make_an_elimination_surer(model, data) -> None:
    groups = discover(model, data[0][0]).groups
    once = eliminations(model, data, groups)
    twice = eliminations(model, Views(data, same), groups)
    for name, found in once.items():
        torch.testing.assert_close(twice[name].growth, found.growth)


@pytest.mark.parametrize("fold", [True, "refit"])
def test_copies_change_nothing_that_is_folded(model, data, fold) -> None:
    def pruned(seen: object) -> nn.Module:
        smaller = copy.deepcopy(model)
        NSSPruner(smaller, data[0][0], pruning_ratio=0.5, data=seen, fold=fold).step()
        return smaller

    for one, two in zip(
        pruned(data).parameters(), pruned(Views(data, same)).parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_copies_are_left_out_together(model, data) -> None:
    once, twice = class_shares(model, data), class_shares(model, Views(data, same))
    assert torch.equal(twice.counts, 2 * once.counts)
    torch.testing.assert_close(twice.sums, 2 * once.sums)


def test_a_profile_that_keeps_what_the_readers_read(model, data) -> None:
    once = profile(model, data, data[0][0], keep_readers=True).readers
    twice = profile(model, Views(data, same), data[0][0], keep_readers=True).readers
    for name, found in once.items():
        assert twice[name].observations == pytest.approx(found.observations, rel=1e-9)


def test_refit_alone(model, data) -> None:
    groups = discover(model, data[0][0]).groups
    half = {group.name: torch.arange(group.size) % 2 == 0 for group in groups}
    fitted = [copy.deepcopy(model) for _ in range(2)]
    for each, seen in zip(fitted, (data, Views(data, same)), strict=True):
        refit(each, Slice(half, groups), seen)
    for one, two in zip(*(each.parameters() for each in fitted), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
