"""Which weights are prunable, counted once, and which cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from nss_prune.errors import ArgumentError, NothingToPruneError, NumericalError
from nss_prune.unstructured.weights import (
    check_finite,
    compression_rate,
    prunable_layers,
    readable_layers,
    weight_count,
)
from reference_unstructured import Tied, convolutional, fresh, perceptron


def names(model, ignored=()):
    return [layer.name for layer in prunable_layers(model, ignored)]


def test_every_kind_of_convolution_and_no_norm():
    model = fresh(convolutional)
    assert names(model) == ["0", "2", "3", "4", "5", "6"]
    assert [layer.input_axis for layer in prunable_layers(model)] == [1, 1, 0, 1, 1, 1]
    assert [layer.is_convolution for layer in prunable_layers(model)] == [True] * 5 + [False]


def test_subclasses_count():
    timm_layers = pytest.importorskip("timm.layers")
    assert names(nn.Sequential(timm_layers.StdConv2d(3, 4, 3))) == ["0"]


def test_attention_has_its_output_projection_pruned():
    assert names(nn.MultiheadAttention(4, 2)) == ["out_proj"]


def test_shared_weights_count_once():
    model = Tied()
    assert names(model) == ["one", "head"]
    assert weight_count(model) == 6 * 6 + 11 * 6
    head = prunable_layers(model)[1]
    assert [module for module, _ in head.holders] == [model.embedding, model.head]


def test_a_module_under_two_names_is_one():
    linear = nn.Linear(3, 3)
    assert names(nn.Sequential(linear, nn.ReLU(), linear)) == ["0"]
    assert names(nn.ModuleDict({"a": nn.Sequential(linear), "b": nn.Sequential(linear)})) == ["a.0"]


def test_first_and_last_are_those_of_the_model():
    model = fresh(convolutional)
    flags = [(layer.is_first, layer.is_last) for layer in prunable_layers(model, ["0"])]
    assert flags == [(False, False)] * 4 + [(False, True)]


@pytest.mark.parametrize("as_name", [True, False])
def test_ignored_layers_are_modules_or_names_with_all_inside(as_name):
    model = nn.Sequential(perceptron(), nn.Linear(4, 4))
    assert names(model, ["0" if as_name else model[0]]) == ["1"]
    assert names(model, "0" if as_name else model[0]) == ["1"]


def test_ignoring_one_holder_ignores_the_shared_weight():
    model = Tied()
    assert names(model, [model.two]) == ["head"]
    assert names(model, ["embedding"]) == ["one"]


@pytest.mark.parametrize("entry", ["no.such", nn.Linear(2, 2), None])
def test_an_ignored_layer_must_be_in_the_model(entry):
    with pytest.raises(ArgumentError, match="not in the model"):
        prunable_layers(perceptron(), [entry])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_nothing_to_prune():
    with pytest.raises(NothingToPruneError):
        prunable_layers(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(0, 3)))
    with pytest.raises(NothingToPruneError):
        prunable_layers(nn.Sequential(nn.Linear(3, 3)), ["0"])
    assert weight_count(nn.ReLU()) == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (parametrizations.weight_norm(nn.Linear(3, 3)), "computed"),
        (nn.LazyLinear(3), "no shape"),
        (nn.Linear(3, 3, dtype=torch.complex64), "complex64"),
        (nn.Linear(3, 3, device="meta"), "meta"),
    ],
)
def test_weights_that_cannot_be_pruned_as_they_are(bad, message):
    model = nn.Sequential(bad, nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match=message):
        prunable_layers(model)
    assert names(model, [bad]) == ["1"]
    assert [layer.name for layer in readable_layers(model)] == ["1"]
    assert not prunable_layers(model, [bad])[0].is_first


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(value):
    model = perceptron()
    with torch.no_grad():
        model[2].weight[3, 4] = value
    with pytest.raises(NumericalError, match="'2'"):
        check_finite(prunable_layers(model))
    check_finite(prunable_layers(model, ["2"]))


def test_masks_made_by_torch_are_read():
    model = perceptron()
    prune.l1_unstructured(model[0], "weight", amount=100)
    prune.random_unstructured(model[0], "bias", amount=2)
    layer = prunable_layers(model)[0]
    assert layer.mask.dtype == torch.bool
    assert layer.remaining == 500
    assert layer.weight is model[0].weight_orig


def test_compression_rate_counts_masked_and_absent_weights():
    model = perceptron()
    assert compression_rate(model, weight_count(model)) == 0
    prune.l1_unstructured(model[0], "weight", amount=100)
    assert compression_rate(model, 2 * weight_count(model)) == 1 - (1110 - 100) / 2220


@pytest.mark.parametrize("dense", [0, -5, 1109])
def test_compression_rate_refuses_too_few_dense_weights(dense):
    with pytest.raises(ArgumentError, match="1110 weights are left"):
        compression_rate(perceptron(), dense)
