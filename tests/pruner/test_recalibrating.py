"""Recalibration by default: where it is known to help, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nss_prune import NSSPruner

INPUTS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
OFF = {"macs_budget": 0.6, "recalibrate": False}


def network(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 12, 3)]
    layers += [nn.ReLU(), nn.Conv2d(12, 16, 3)]
    if norm:
        layers.append(nn.BatchNorm2d(16))
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def batches(samples: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 3, 6, 6, generator=random)
    return list(zip(inputs.split(100), (torch.arange(samples) % 3).split(100), strict=True))


def pruned(samples: int = 500, norm: bool = True, **arguments: Any) -> NSSPruner:
    data = arguments.pop("data", None) or batches(samples)
    pruner = NSSPruner(network(norm), INPUTS, data=data, progress=False, **arguments)
    pruner.step()
    return pruner


def notes(pruner: NSSPruner) -> list[str]:
    return [note for note in pruner.report.notes if "recalibrated" in note]


def same(one: NSSPruner, other: NSSPruner) -> bool:
    values = other.model.state_dict()
    return all(torch.equal(value, values[name]) for name, value in one.model.state_dict().items())


def test_a_deep_budget_with_enough_samples_is_recalibrated() -> None:
    found = pruned(macs_budget=0.6)
    assert same(found, pruned(macs_budget=0.6, recalibrate=True))
    assert not same(found, pruned(**OFF))
    (note,) = notes(found)
    assert "recalibrate=False leaves it out" in note
    passes = NSSPruner(network(), INPUTS, data=batches(500), macs_budget=0.6).plan()
    assert "recalibration" in [stage.name for stage in passes.stages]


def test_fewer_samples_are_not_enough() -> None:
    found = pruned(499, macs_budget=0.6)
    assert same(found, pruned(499, **OFF))
    (note,) = notes(found)
    assert "fewer than 500 samples" in note
    passes = NSSPruner(network(), INPUTS, data=batches(499), macs_budget=0.6).plan()
    assert "recalibration" not in [stage.name for stage in passes.stages]


@pytest.mark.parametrize(
    "arguments",
    [
        {"macs_budget": 0.75},
        {"params_budget": 0.6},
        {"theta": 0.9},
        {"macs_budget": 0.6, "fold": False},
        {"max_divergence": 0.1},
        {"macs_budget": 0.6, "norm": False},
    ],
)
def test_nothing_is_recalibrated_where_that_was_not_measured(arguments: dict[str, Any]) -> None:
    found = pruned(**arguments)
    assert same(found, pruned(**arguments, recalibrate=False))
    assert notes(found) == []


def test_data_that_can_be_read_only_once_is_not_read_again() -> None:
    found = pruned(data=iter(batches(500)), macs_budget=0.6, strategy="semantic")
    assert notes(found) == []


def test_the_norms_of_an_unchanged_layer_stay_as_they_are() -> None:
    """Nothing of what a norm receives changes where no neuron before it goes."""
    model = network()
    before = copy.deepcopy(model[3].state_dict())
    pruner = NSSPruner(
        model, INPUTS, data=batches(500), macs_budget=0.7, progress=False,
        ignored_layers=[model[0]], round_to=1,
    )  # fmt: skip
    pruner.step()
    kept = pruner.slice.kept["2"]
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(model[3].state_dict()[name], before[name][kept])
