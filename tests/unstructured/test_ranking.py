"""The search over layers, against sorting all scores in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nss_prune.unstructured.allocation import global_magnitude, lamp
from nss_prune.unstructured.weights import prunable_layers
from reference_unstructured import lamp_scores, magnitudes, ranked

ORACLES = [(lamp, lamp_scores), (global_magnitude, magnitudes)]


def model_of(*weights: torch.Tensor) -> nn.Sequential:
    """Bias-free Linear layers with these weights."""
    model = nn.Sequential()
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight.clone())
        model.append(layer)
    return model


def assert_same_budgets(method, oracle, weights, step=1):
    """At every `step`-th number of weights to keep."""
    layers = prunable_layers(model_of(*weights))
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    scores = [oracle(weight, mask) for weight, mask in zip(weights, masks, strict=True)]
    owners = [layer for layer, _ in ranked(scores, masks)]
    for keep in range(0, len(owners) + 1, step):
        expected = [owners[:keep].count(layer) for layer in range(len(layers))]
        assert method(layers, keep) == expected, keep


@pytest.mark.parametrize(("method", "oracle"), ORACLES)
def test_every_budget_of_random_layers(method, oracle):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, 9, generator=generator) * scale for scale in (0.01, 1.0, 30.0)]
    assert_same_budgets(method, oracle, weights)


@pytest.mark.parametrize(("method", "oracle"), ORACLES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_budgets_of_widely_spread_layers(method, oracle, dtype):
    generator = torch.Generator().manual_seed(1)
    reach = 4 if dtype == torch.float16 else 18
    weights = [
        (10 ** (torch.rand(6, 10, generator=generator) * 2 * reach - reach)).to(dtype)
        for _ in range(3)
    ]
    assert_same_budgets(method, oracle, weights, step=7)


@pytest.mark.parametrize(("method", "oracle"), ORACLES)
def test_ties_within_and_between_layers(method, oracle):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randint(-3, 4, (5, 8), generator=generator).float() for _ in range(3)]
    assert_same_budgets(method, oracle, [*weights, weights[0]])


@pytest.mark.parametrize(("method", "oracle"), ORACLES)
def test_constant_and_all_zero_layers(method, oracle):
    weights = [torch.zeros(4, 5), torch.full((4, 5), 0.5), torch.zeros(1, 3), torch.ones(5, 4)]
    assert_same_budgets(method, oracle, weights)


@pytest.mark.parametrize(("method", "oracle"), ORACLES)
def test_layers_of_mixed_precision(method, oracle):
    generator = torch.Generator().manual_seed(3)
    weights = [
        torch.randn(5, 7, generator=generator).to(dtype)
        for dtype in (torch.float16, torch.float64, torch.bfloat16, torch.float32)
    ]
    assert_same_budgets(method, oracle, weights)


def test_lamp_keeps_one_weight_of_each_layer_first():
    weights = [torch.full((10, 10), 2.0), torch.randn(3, 3), torch.randn(9, 9) * 1e-9]
    assert lamp(prunable_layers(model_of(*weights)), 3) == [1, 1, 1]


def test_lamp_by_hand():
    """Layer one scores 16/16, 9/25, 0; layer two 4/4, 4/8, 1/9."""
    layers = prunable_layers(
        model_of(torch.tensor([[3.0, 0.0, -4.0]]), torch.tensor([[2.0, 1.0, -2.0]]))
    )
    assert [lamp(layers, keep) for keep in range(7)] == [
        [0, 0], [1, 0], [1, 1], [1, 2], [2, 2], [2, 3], [3, 3],
    ]  # fmt: skip


def test_lamp_does_not_lose_the_tail():
    """One huge weight: total - cumsum in float32 would leave 0 for all others' sums."""
    tail = torch.linspace(1e-6, 2e-6, 60).view(6, 10)
    weights = [torch.cat([torch.tensor([[1e4] + [0.0] * 9]), tail]), tail * 3]
    assert_same_budgets(lamp, lamp_scores, weights)


def oracle_budgets(weights: list[torch.Tensor], keep: int) -> list[int]:
    """LAMP's definition in float64 with numpy, for layers too large for loops."""
    scores, owners = [], []
    for layer, weight in enumerate(weights):
        squares = np.sort(weight.double().square().flatten().numpy())[::-1]
        scores.append(squares / np.cumsum(squares))
        owners.append(np.full(len(squares), layer))
    order = np.argsort(-np.concatenate(scores), kind="stable")[:keep]
    return np.bincount(np.concatenate(owners)[order], minlength=len(weights)).tolist()


@pytest.mark.slow
def test_lamp_on_ten_million_widely_spread_weights():
    generator = torch.Generator().manual_seed(4)
    spread = 10 ** (torch.rand(2500, 4000, generator=generator) * 36 - 18)
    normal = torch.randn(1000, 1000, generator=generator)
    half = (torch.randn(1000, 500, generator=generator) * 0.02).to(torch.bfloat16)
    weights = [spread, normal, half]
    layers = prunable_layers(model_of(*weights))
    total = sum(weight.numel() for weight in weights)
    for share in (0.9, 0.5, 0.1, 0.001):
        keep = round(total * share)
        assert lamp(layers, keep) == oracle_budgets(weights, keep)
