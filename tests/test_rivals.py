"""VBP and CORP by their formulas, on activations that are written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.rivals import corp, vbp
from networks import mlp
from nss_prune import NSSPruner
from nss_prune.statistics.moments import ConsumerStatistics


@pytest.fixture
def model():
    torch.manual_seed(0)
    return mlp().eval()  # 12 inputs, two hidden layers, in float64


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in inputs.split(32)]


def hidden_activations(model, batches):
    """What the second and the third linear layer receive, [samples, neurons]."""
    inputs = torch.cat([x for x, _ in batches])
    first = model[:3](inputs)
    return {"1": first, "3": model[3:5](first)}


def pruned(model, batches, strategy, repairs, budget=0.5):
    smaller = copy.deepcopy(model)
    pruner = NSSPruner(
        smaller, batches[0][0][:2], macs_budget=budget, data=batches, strategy=strategy,
        fold=False, repairs=repairs, progress=False,
    )  # fmt: skip
    pruner.step()
    return smaller, pruner


def kept_of(model, smaller, layer):
    return torch.isin(model[int(layer)].bias, smaller[int(layer)].bias)


@torch.no_grad()
def test_vbp_keeps_what_varies_most_over_all_layers(model, batches):
    strategy = vbp.ActivationVariance(batches, together=True)
    _, pruner = pruned(model, batches, strategy, [])
    scores = {
        name: values.var(0, correction=0)
        for name, values in hidden_activations(model, batches).items()
    }
    kept = {name: pruner.slice.kept[name] for name in scores}
    assert sum(int((~mask).sum()) for mask in kept.values()) > 3
    lowest = min(float(scores[name][mask].min()) for name, mask in kept.items())
    highest = max(float(scores[name][~mask].max()) for name, mask in kept.items() if (~mask).any())
    assert lowest > highest


@torch.no_grad()
def test_vbp_puts_the_mean_into_the_bias(model, batches):
    strategy = vbp.ActivationVariance(batches, together=False)
    smaller, pruner = pruned(model, batches, strategy, [vbp.MeanShift()])
    activations = hidden_activations(model, batches)
    for name, consumer in (("1", 3), ("3", 5)):
        gone = ~pruner.slice.kept[name]
        shift = model[consumer].weight[:, gone] @ activations[name].mean(0)[gone]
        outputs = pruner.slice.kept.get(str(consumer), slice(None))
        expected = (model[consumer].bias + shift)[outputs]
        torch.testing.assert_close(smaller[consumer].bias, expected)


@torch.no_grad()
def test_corp_lets_the_others_stand_for_what_is_removed(model, batches):
    strategy = corp.ActivationEnergy(batches, together=False)
    smaller, pruner = pruned(model, batches, strategy, [corp.RidgeCompensation()])
    for name, consumer in (("1", 3), ("3", 5)):
        values = hidden_activations(model, batches)[name]
        kept = pruner.slice.kept[name]
        energy = values.square().mean(0)
        assert energy[kept].min() > energy[~kept].max()
        # Ridge regression on centred data, as augmented least squares.
        centre = values.mean(0)
        known, gone = (values - centre)[:, kept], (values - centre)[:, ~kept]
        penalty = corp.PENALTY * known.square().mean() * len(values)
        rows = torch.cat([known, penalty.sqrt() * torch.eye(known.shape[1]).double()])
        targets = torch.cat([gone, torch.zeros(known.shape[1], gone.shape[1]).double()])
        matrix = torch.linalg.lstsq(rows, targets).solution.T
        weight = model[consumer].weight
        constant = centre[~kept] - matrix @ centre[kept]
        outputs = pruner.slice.kept.get(str(consumer), slice(None))
        torch.testing.assert_close(
            smaller[consumer].weight, (weight[:, kept] + weight[:, ~kept] @ matrix)[outputs]
        )
        torch.testing.assert_close(
            smaller[consumer].bias, (model[consumer].bias + weight[:, ~kept] @ constant)[outputs]
        )


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_takes_constants_as_it_takes_a_constant_map(padding):
    torch.manual_seed(0)
    for groups in (1, 2):
        module = nn.Conv2d(4, 6, 3, padding=padding, groups=groups).double()
        values = torch.randn(4, dtype=torch.float64)
        added = module(values[None, :, None, None].expand(1, 4, 9, 9))[0, :, 4, 4] - module.bias
        torch.testing.assert_close(vbp.output_of_constant(module, values), added)


@torch.no_grad()
def test_a_flattened_map_is_compensated_at_all_its_positions():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)
    model = nn.Sequential(*layers).double().eval()
    data = [(torch.randn(600, 3, 6, 6).double(), torch.arange(600) % 5)]
    errors = []
    for repairs in ([], [vbp.MeanShift()], [corp.RidgeCompensation()]):
        strategy = corp.ActivationEnergy(data, together=True)
        smaller, _ = pruned(model, data, strategy, repairs)
        errors.append(float((smaller(data[0][0]) - model(data[0][0])).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_of_a_wide_map_each_position_takes_the_same_from_its_neighbours():
    covariance = torch.tensor([[4.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    mean = torch.arange(6, dtype=torch.float64)  # two neurons at three positions
    statistics = ConsumerStatistics(mean, covariance, 10, 10, 10.0, (6,))
    assert vbp.variances(statistics).tolist() == [4, 4, 4, 2, 2, 2]
    removed = torch.tensor([False] * 3 + [True] * 3)
    found = corp.regression(statistics, removed)
    share = 1 / (4 * (1 + corp.PENALTY))
    torch.testing.assert_close(found[3:, :3], share * torch.eye(3).double())
    assert not found[:3].any()
    assert not found[:, 3:].any()
