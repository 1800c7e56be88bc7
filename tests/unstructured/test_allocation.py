"""Budgets of every method: exact totals, each one's rule, and methods of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nss_prune.errors import ArgumentError, NothingToPruneError
from nss_prune.unstructured.allocation import METHODS, allocate, erk, proportional, uniform_plus
from nss_prune.unstructured.sparsify import sparsify
from nss_prune.unstructured.weights import prunable_layers
from reference_unstructured import (
    convolutional,
    erk_budgets,
    fresh,
    perceptron,
    uniform_plus_budgets,
)


def resnet_like() -> nn.Sequential:
    """The convolutions of a ResNet-20 and its head."""
    widths = [(3, 16)] + [(16, 16)] * 6 + [(16, 32)] + [(32, 32)] * 5 + [(32, 64)]
    widths += [(64, 64)] * 5
    layers = [nn.Conv2d(inputs, outputs, 3, bias=False) for inputs, outputs in widths]
    shortcuts = [nn.Conv2d(16, 32, 1), nn.Conv2d(32, 64, 1)]
    return nn.Sequential(*layers, *shortcuts, nn.Linear(64, 10))


def sizes_and_left(layers):
    return [layer.size for layer in layers], [layer.remaining for layer in layers]


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("make", [perceptron, convolutional, resnet_like])
@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.37])
def test_budgets_fit_and_sum_to_the_total(method, make, share):
    layers = prunable_layers(fresh(make))
    keep = round(share * sum(layer.size for layer in layers))
    budgets = allocate(method, layers, keep)
    assert sum(budgets) == keep
    assert all(0 <= budget <= layer.size for budget, layer in zip(budgets, layers, strict=True))


@pytest.mark.parametrize("share", [0.95, 0.5, 0.2, 0.05])
@pytest.mark.parametrize("earlier", [None, "lamp"])
def test_erk_densities_on_resnet_shapes(share, earlier):
    model = fresh(resnet_like)
    if earlier:
        sparsify(model, 0.5, earlier)
    layers = prunable_layers(model)
    left = [layer.remaining for layer in layers]
    keep = round(share * sum(left))
    expected = erk_budgets([layer.shape for layer in layers], left, keep)
    for budget, exact in zip(erk(layers, keep), expected, strict=True):
        assert abs(budget - exact) < 1


def test_erk_makes_small_layers_dense_one_at_a_time():
    layers = prunable_layers(fresh(resnet_like))
    keep = sum(layer.size for layer in layers) // 5
    dense = [budget == layer.size for budget, layer in zip(erk(layers, keep), layers, strict=True)]
    assert dense[0]
    assert dense[-1]
    assert not dense[18]


@pytest.mark.parametrize("make", [perceptron, convolutional, resnet_like])
@pytest.mark.parametrize("share", [0.95, 0.5, 0.3])
@pytest.mark.parametrize("earlier", [None, "lamp"])
def test_uniform_plus_against_its_definition(make, share, earlier):
    model = fresh(make)
    if earlier:
        sparsify(model, 0.2, earlier)
    layers = prunable_layers(model)
    sizes, left = sizes_and_left(layers)
    keep = round(share * sum(left))
    expected = uniform_plus_budgets(sizes, left, keep, layers[0].is_convolution)
    for budget, exact in zip(uniform_plus(layers, keep), expected, strict=True):
        assert abs(budget - exact) < 1


def test_uniform_plus_keeps_the_first_convolution_and_a_fifth_of_the_last_layer():
    layers = prunable_layers(fresh(resnet_like))
    budgets = uniform_plus(layers, sum(layer.size for layer in layers) // 20)
    assert budgets[0] == layers[0].size
    assert budgets[-1] == layers[-1].size // 5
    assert len({round(b / layer.size, 2) for b, layer in zip(budgets, layers, strict=True)}) == 3


def test_uniform_plus_prunes_a_first_linear_layer():
    layers = prunable_layers(perceptron())
    assert uniform_plus(layers, 555) == [300, 225, 30]


def test_uniform_plus_exempts_only_the_model_s_own_ends():
    layers = prunable_layers(fresh(resnet_like), ["0", "21"])
    keep = sum(layer.size for layer in layers) // 10
    budgets = uniform_plus(layers, keep)
    for budget, layer in zip(budgets, layers, strict=True):
        assert abs(budget - layer.size / 10) < 1


def test_uniform_plus_says_when_its_exceptions_leave_nothing_to_prune():
    layers = prunable_layers(fresh(resnet_like))
    with pytest.raises(NothingToPruneError, match="exempt"):
        uniform_plus(layers, layers[0].size)


def test_proportional_gives_remainders_to_the_largest_then_the_first():
    layers = prunable_layers(perceptron())
    assert proportional([1, 1, 1], layers, 100) == [34, 33, 33]
    assert proportional([1, 2, 1], layers, 102) == [26, 51, 25]
    assert proportional([5, 5, 5], layers, 1110) == [600, 450, 60]


@pytest.mark.parametrize(
    "budgets", [[1, 2], [1, 2, 3, 4], [101, -1, 0], [601, -500, -1], [100, 1, 0]]
)
def test_budgets_that_break_the_rule_are_refused(budgets):
    with pytest.raises(ArgumentError, match="sum to 100"):
        allocate(lambda layers, keep: budgets, prunable_layers(perceptron()), 100)


@pytest.mark.parametrize("method", ["LAMP", "", None, ["lamp"], 3])
def test_unknown_methods_are_refused(method):
    with pytest.raises(ArgumentError, match="uniform\\+"):
        allocate(method, prunable_layers(perceptron()), 100)


def test_a_method_of_one_s_own_by_name_or_as_a_function(monkeypatch):
    def first_only(layers, keep):
        kept = [layer.remaining for layer in layers]
        return [keep - sum(kept[1:]), *kept[1:]]

    monkeypatch.setitem(METHODS, "first", first_only)
    for method in ("first", first_only):
        masks = sparsify(fresh(perceptron), 0.25, method)
        assert [int((~mask).sum()) for mask in masks.values()] == [278, 0, 0]
    assert torch.is_tensor(masks["0"])
