"""Views add samples, but what is estimated knows which of them are of the same one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import hflip

from networks import batches, cnn, settled
from nss_prune import Views
from nss_prune.allocation.elimination import eliminations
from nss_prune.compensation.balance import class_shares
from nss_prune.core.views import views_of
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, DataError
from nss_prune.statistics.consumers import ConsumerSums, consumer_statistics

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


def distinct(model: nn.Module, data: Iterable[Any]) -> dict[str, float]:
    groups = discover(model, next(iter(data))[0]).groups
    sums = ConsumerSums(model, groups, views_of(data))
    for inputs, _ in data:
        with sums.watching(len(inputs)), torch.no_grad():
            model(inputs)
    return {name: sums.moments(name).distinct(name) for name in sums.consumers}


def test_a_copy_of_each_sample_is_no_other_observation(model, data) -> None:
    groups = discover(model, data[0][0]).groups
    once = consumer_statistics(model, data, groups)
    counted, copied = distinct(model, data), distinct(model, Views(data, same))
    for name, found in once.items():
        assert counted[name] == found.observations
        assert copied[name] == pytest.approx(found.observations, rel=1e-9)


def test_views_that_have_nothing_in_common_are_samples(model, data) -> None:
    once, more = distinct(model, data), distinct(model, Views(data, fresh))
    assert all(more[name] > 1.7 * count for name, count in once.items())


def test_copies_do_not_make_an_elimination_surer(model, data) -> None:
    groups = discover(model, data[0][0]).groups
    once = eliminations(model, data, groups)
    twice = eliminations(model, Views(data, same), groups)
    for name, found in once.items():
        torch.testing.assert_close(twice[name].growth, found.growth)


def test_copies_are_left_out_together(model, data) -> None:
    once, twice = class_shares(model, data), class_shares(model, Views(data, same))
    assert torch.equal(twice.counts, 2 * once.counts)
    torch.testing.assert_close(twice.sums, 2 * once.sums)
