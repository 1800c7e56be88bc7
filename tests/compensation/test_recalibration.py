"""Recalibration: the averages that naive loops find, and a model as before after a failure."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from networks import assert_unchanged, batches, cnn, fingerprint, mlp
from nss_prune import NSSPruner
from nss_prune.compensation.recalibration import kept_statistics, norm_statistics, recalibrate
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError, NumericalError
from nss_prune.graph.slices import Slice
from nss_prune.surgery.removal import remove


def two_norms() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(3 * 4 * 4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2),
    ).double().eval()  # fmt: skip


def naive(model, data):
    """(mean, variance) of both norms: averages over batches, each weighed by its samples."""
    conv, first, linear, second = model[0], model[1], model[5], model[6]
    total = sum(len(inputs) for inputs, _ in data)
    expected = [[0.0, 0.0], [0.0, 0.0]]
    for inputs, _ in data:
        maps = conv(inputs)
        mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
        shape = (1, -1, 1, 1)
        normed = (maps - mean.view(shape)) / (variance.view(shape) + first.eps).sqrt()
        normed = normed * first.weight.view(shape) + first.bias.view(shape)
        values = linear(normed.relu().flatten(1))
        assert second.weight.shape == values.shape[1:]
        share = len(inputs) / total
        expected[0][0] += share * mean
        expected[0][1] += share * maps.var((0, 2, 3), unbiased=True)
        expected[1][0] += share * values.mean(0)
        expected[1][1] += share * values.var(0, unbiased=True)
    return expected


@torch.no_grad()
def test_statistics_are_the_averages_over_the_batches_however_uneven():
    model = two_norms()
    data = batches(37, (2, 6, 6), 2)
    assert [len(inputs) for inputs, _ in data] == [16, 16, 5]
    expected = naive(model, data)
    assert recalibrate(model, data) == ("1", "6")
    for norm, (mean, variance) in zip((model[1], model[6]), expected, strict=True):
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_what_the_statistics_were_does_not_matter():
    first, second = two_norms(), two_norms()
    second[1].running_mean.fill_(7.0)
    second[6].running_var.fill_(100.0)
    data = batches(32, (2, 6, 6), 2)
    for model in (first, second):
        recalibrate(model, data)
    state = first.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in second.state_dict().items())


def test_nothing_else_changes():
    model = two_norms()
    model[1].train()
    model[0].weight.requires_grad_(False)
    before = fingerprint(model)
    recalibrate(model, batches(32, (2, 6, 6), 2))
    after = fingerprint(model)
    for key in ("objects", "gradients", "modes", "widths", "hooks"):
        assert before[key] == after[key]
    for name, value in model.named_parameters():
        assert torch.equal(value, before["state"][name])


def test_it_puts_right_what_a_scaled_layer_put_wrong():
    torch.manual_seed(0)
    model = cnn().train()
    data = batches(64, (3, 12, 12), 5, size=64)
    recalibrate(model, data)
    expected = model.eval()(data[0][0])
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[0].weight.mul_(3.0)
        changed[0].bias.mul_(3.0)
    assert not torch.allclose(changed(data[0][0]), expected, rtol=1e-2)
    recalibrate(changed, data)
    torch.testing.assert_close(changed(data[0][0]), expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_data_are_read_without_a_trace():
    model = two_norms().train()
    data = batches(37, (2, 6, 6), 2)
    before = fingerprint(model)
    found = norm_statistics(model, data)
    assert_unchanged(model, before)
    with torch.no_grad():
        expected = naive(model.eval(), data)
    for name, (mean, variance) in zip(("1", "6"), expected, strict=True):
        torch.testing.assert_close(found[name].mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[name].variance, variance, rtol=1e-12, atol=1e-12)
        assert torch.equal(found[name].running_mean, model.get_submodule(name).running_mean)


def test_beside_the_whole_model_what_did_not_change_stays():
    model = two_norms()
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[6].running_var.uniform_(1, 2)
    expected = copy.deepcopy(model)
    data = batches(37, (2, 6, 6), 2)
    recalibrate(model, data, whole=norm_statistics(model, data))
    for name, value in expected.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_beside_the_whole_model_a_shift_is_undone_whatever_the_samples():
    torch.manual_seed(0)
    model = cnn().eval()  # with statistics of other data
    recalibrate(model, batches(64, (3, 12, 12), 5, size=64))
    few = [(1 + 2 * inputs, labels) for inputs, labels in batches(16, (3, 12, 12), 5)]
    expected = model(few[0][0])
    whole = norm_statistics(model, few)
    with torch.no_grad():
        model[0].bias.add_(3.0)
    recalibrate(model, few, whole=whole)
    torch.testing.assert_close(model(few[0][0]), expected)


def test_of_a_smaller_model_the_channels_that_stay_are_compared():
    model = two_norms()
    data = batches(64, (2, 6, 6), 2)
    groups = discover(model, data[0][0][:2]).groups
    kept = {group.name: torch.arange(group.size) != 1 for group in groups}
    critical = Slice(kept, groups)
    whole = norm_statistics(model, data)
    assert sorted(whole) == ["1", "6"]
    remove(model, critical, data[0][0][:2])
    with pytest.raises(ModelMismatchError, match="statistics of 3 channels for 1, which has 2"):
        recalibrate(model, data, whole=whole)
    before = model[1].running_mean
    recalibrate(model, data, whole=kept_statistics(whole, critical))
    torch.testing.assert_close(model[1].running_mean, before)  # what it reads did not change
    assert len(model[6].running_mean) == 4
    with pytest.raises(ModelMismatchError, match="no statistics for 1"):
        recalibrate(model, data, whole={})


def test_a_norm_that_is_called_twice_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.unused = nn.BatchNorm1d(2)

        def forward(self, inputs):
            return self.norm(inputs) + self.norm(3 * inputs)

    model = Twice().double()
    model.unused.running_mean.fill_(5.0)
    ((inputs, _),) = data = batches(16, (2,), 2)
    assert recalibrate(model, data) == ("norm",)
    torch.testing.assert_close(model.norm.running_mean, 2 * inputs.mean(0))
    torch.testing.assert_close(model.norm.running_var, 5 * inputs.var(0))
    assert model.unused.running_mean.tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], DataError, "no batches"),
        ([*batches(16, (2, 6, 6), 2), *batches(4, (9, 6, 6), 2)], DataError, "refuses batch 1"),
        ([*batches(16, (2, 6, 6), 2), *batches(1, (2, 6, 6), 1)], DataError, "more than 1 value"),
        ([(torch.full((4, 2, 6, 6), torch.nan).double(), None)], NumericalError, "1 reads NaN"),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(data, error, message):
    model = two_norms().train()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        recalibrate(model, data)
    assert_unchanged(model, before)
    assert [module.momentum for module in (model[1], model[6])] == [0.3, 0.1]


@pytest.mark.parametrize(
    "model", [mlp(), nn.Sequential(nn.BatchNorm1d(12, track_running_stats=False))]
)
def test_a_model_without_running_statistics_is_refused(model):
    with pytest.raises(ArgumentError, match="has no BatchNorm with running statistics"):
        recalibrate(model, batches(8, (12,), 3))


def trained_like(seed: int = 0) -> tuple[nn.Module, list]:
    """A network whose second norm reads what a first layer with spare neurons makes."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(12, 30), nn.BatchNorm1d(30), nn.ReLU(),
        nn.Linear(30, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5),
    ).double()  # fmt: skip
    data = batches(600, (12,), 5, size=100)
    recalibrate(model, data)
    return model.eval(), data


def test_the_pruner_recalibrates_beside_the_whole_model():
    model, data = trained_like()
    expected, few = copy.deepcopy(model), data[:2]
    pruner = NSSPruner(model, data[0][0][:2], data=few, params_budget=0.6, recalibrate=True)
    pruner.step()
    whole = norm_statistics(expected, few)
    NSSPruner(expected, data[0][0][:2], data=few, params_budget=0.6).step()
    assert not torch.equal(expected[4].running_var, model[4].running_var)
    recalibrate(expected, few, whole=kept_statistics(whole, pruner.slice))
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_the_pruner_says_that_there_is_nothing_to_recalibrate():
    model = mlp()
    data = batches(64, (12,), 3)
    pruner = NSSPruner(model, data[0][0][:2], data=data, params_budget=0.7, recalibrate=True)
    pruner.step()
    assert pruner.report is not None
    assert "nothing was recalibrated: the model has no BatchNorm" in pruner.report.notes


@pytest.mark.parametrize(
    ("data", "message"), [(None, "with no data"), (iter([]), "with list_iterator")]
)
def test_the_pruner_needs_data_that_it_can_read_twice(data, message):
    with pytest.raises(ArgumentError, match=message):
        NSSPruner(mlp(), torch.zeros(2, 12).double(), data=data, recalibrate=True)
