"""Widths that hardware is fast with, and the budget all the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from nss_prune import NSSPruner
from nss_prune.allocation.budget import TOLERANCE
from nss_prune.errors import ArgumentError


def network(*widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def data(
    inputs: int, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(128, inputs, generator=generator).to(dtype)
    return [(pictures, torch.arange(128) % 5)]


def widths(model: nn.Sequential) -> list[int]:
    return [layer.out_features for layer in model if isinstance(layer, nn.Linear)][:-1]


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_wide_layers_keep_multiples_of_8_and_narrow_ones_any_number(budget: float) -> None:
    model = network(20, 256, 192, 63, 5)
    pruner = NSSPruner(model, torch.zeros(1, 20), params_budget=budget, data=data(20))
    pruner.step()
    assert [width % 8 for width in widths(model)[:2]] == [0, 0]
    report = pruner.report
    assert abs(report.after.parameters / report.before.parameters - budget) <= TOLERANCE
    kept = {name: int(mask.sum()) for name, mask in pruner.slice.kept.items()}
    assert list(kept.values()) == widths(model)


@pytest.mark.parametrize(
    ("hidden", "budget"),  # that multiples of 16 meet: of 512 twice a step is up to 3 %
    [((512, 512), 0.485), ((2048,), 0.5)],
)
def test_half_precision_keeps_multiples_of_16(hidden: tuple[int, ...], budget: float) -> None:
    dtype = torch.bfloat16
    model = network(20, *hidden, 5, dtype=dtype)
    batches = data(20, dtype)
    pruner = NSSPruner(model, torch.zeros(1, 20, dtype=dtype), params_budget=budget, data=batches)
    pruner.step()
    assert [width % 16 for width in widths(model)] == [0] * len(hidden)
    report = pruner.report
    assert abs(report.after.parameters / report.before.parameters - budget) <= TOLERANCE


def test_a_budget_that_multiples_would_miss_is_met_with_smaller_ones() -> None:
    model = network(20, 64, 5)
    NSSPruner(model, torch.zeros(1, 20), params_budget=0.3, data=data(20)).step()
    # With n neurons there are 26 n + 5 of 1,669 parameters: 16 are 25.2 %, 18 are 28.3 %.
    assert widths(model) == [19]


def test_one_is_exact_and_theta_is_not_rounded() -> None:
    model = network(20, 256, 5)
    pruner = NSSPruner(model, torch.zeros(1, 20), theta=0.9, data=data(20))
    assert pruner.round_to is None
    exact = NSSPruner(model, torch.zeros(1, 20), params_budget=0.5, data=data(20), round_to=1)
    (kept,) = exact.slice.kept.values()
    # parameters of the smaller model: 20 n + n + 5 n + 5 of 6,661 for 256
    assert int(kept.sum()) == (6661 * 0.5 - 5) // 26


@pytest.mark.parametrize("wrong", ["all", 0, -8, 2.5, True])
def test_what_it_may_be(wrong: object) -> None:
    with pytest.raises(ArgumentError, match="round_to is"):
        NSSPruner(network(20, 64, 5), torch.zeros(1, 20), params_budget=0.5, round_to=wrong)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.77])
def test_where_one_neuron_is_more_than_the_tolerance_rounding_takes_no_more(budget: float) -> None:
    exact, rounded = network(20, 64, 5), network(20, 64, 5)
    for model, round_to in ((exact, 1), (rounded, "auto")):
        example = torch.zeros(1, 20)
        NSSPruner(model, example, params_budget=budget, data=data(20), round_to=round_to).step()
    one = 26 / sum(value.numel() for value in network(20, 64, 5).parameters())
    assert one > TOLERANCE
    assert widths(exact) == widths(rounded)
