"""Masks as torch.nn.utils.prune knows them, on everything that holds a weight."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from nss_prune.unstructured import masks as module
from nss_prune.unstructured.masks import make_permanent, masks_of, refresh, set_masks
from nss_prune.unstructured.sparsify import sparsify
from nss_prune.unstructured.weights import prunable_layers
from reference_unstructured import (
    Reader,
    Tied,
    assert_as_it_was,
    convolutional,
    fresh,
    perceptron,
    snapshot,
)

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
}


def train(model, optimizer, inputs):
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def test_same_state_as_custom_from_mask():
    ours, theirs = fresh(perceptron), fresh(perceptron)
    for name, mask in sparsify(ours, 0.5).items():
        prune.custom_from_mask(theirs.get_submodule(name), "weight", mask)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name].to(value.dtype), value)
    inputs = torch.randn(5, 20)
    assert torch.equal(ours(inputs), theirs(inputs))
    assert prune.is_pruned(ours)


def test_remove_makes_the_zeros_permanent():
    model = fresh(perceptron)
    masks = sparsify(model, 0.5)
    inputs = torch.randn(5, 20)
    expected = model(inputs)
    for name, mask in masks.items():
        layer = prune.remove(model.get_submodule(name), "weight")
        assert isinstance(layer.weight, nn.Parameter)
        assert not layer.weight[~mask].any()
    assert not prune.is_pruned(model)
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("make", [perceptron, convolutional, Tied, Reader])
def test_make_permanent_leaves_plain_parameters_in_their_order(make):
    model = fresh(make)
    names = list(model.state_dict())
    masks = sparsify(model, 0.5)
    make_permanent(model)
    assert list(model.state_dict()) == names
    assert not prune.is_pruned(model)
    assert not any(child._forward_pre_hooks for child in model.modules())
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        assert torch.equal(weight != 0, mask)


def test_refining_adds_neither_hooks_nor_tensors():
    model = fresh(perceptron)
    sparsify(model, 0.1)
    tensors = list(model.state_dict())
    for _ in range(5):
        sparsify(model, 0.1)
        assert list(model.state_dict()) == tensors
        for layer in prunable_layers(model):
            hooks = list(layer.module._forward_pre_hooks.values())
            assert [type(hook) for hook in hooks] == [module.MaskedWeight]
            assert not any(torch.is_tensor(value) for value in vars(hooks[0]).values())
            assert layer.module.weight_mask.dtype == torch.bool


def test_refines_masks_that_torch_made_and_torch_refines_ours():
    model = fresh(perceptron)
    for _ in range(2):
        prune.l1_unstructured(model[0], "weight", amount=0.2)
    prune.l1_unstructured(model[0], "bias", amount=3)
    before = model[0].weight_mask.bool()
    masks = sparsify(model, 0.3)
    assert not (masks["0"] & ~before).any()
    assert len(model[0]._forward_pre_hooks) == 2
    prune.l1_unstructured(model[2], "weight", amount=10)
    assert int(masks["2"].sum() - model[2].weight_mask.sum()) == 10
    assert not (model[2].weight_mask.bool() & ~masks["2"]).any()
    assert int(sparsify(model, 0.0)["2"].sum()) == int(model[2].weight_mask.sum())


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("made_before", [True, False])
def test_masked_weights_stay_zero_through_training(optimizer, made_before):
    model = fresh(perceptron)
    inputs = torch.randn(8, 20)
    early = OPTIMIZERS[optimizer](model.parameters())
    train(model, early, inputs)
    masks = sparsify(model, 0.6)
    values = {name: model.get_submodule(name).weight.clone() for name in masks}
    late = early if made_before else OPTIMIZERS[optimizer](model.parameters())
    train(model, late, inputs)
    refresh(model)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any()
        assert (weight[mask] != values[name][mask]).all()
    sparsify(model, 0.2)
    make_permanent(model)
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any()


def test_masking_keeps_the_order_of_parameters():
    model = fresh(perceptron)
    before = list(model.parameters())
    sparsify(model, 0.5)
    assert all(one is two for one, two in zip(model.parameters(), before, strict=True))


def test_shared_weights_are_masked_in_every_holder():
    model = fresh(Tied)
    masks = sparsify(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tokens = torch.randint(0, 11, (4, 3))
    train(model, optimizer, tokens)
    assert torch.equal(model.embedding.weight, model.head.weight)
    assert torch.equal(model.one.weight, model.two.weight)
    assert not model.embedding.weight[~masks["head"]].any()
    assert not model.two.weight[~masks["one"]].any()
    expected = model(tokens)
    make_permanent(model)
    assert model.two.weight is model.one.weight
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model(tokens), expected)


def test_modules_that_read_weights_of_children_directly_get_fresh_ones():
    model = fresh(Reader)
    masks = sparsify(model, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(2, 3, 6)
    train(model, optimizer, inputs)
    for name, mask in masks.items():
        child = model.get_submodule(name)
        assert child.weight_orig.grad[mask].any()
        assert not child.weight_orig.grad[~mask].any()
    before = model(inputs)
    make_permanent(model)
    assert torch.equal(model(inputs), before)


@pytest.mark.parametrize("training", [True, False])
def test_the_fast_path_of_transformers_gets_fresh_weights(training):
    model = fresh(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    sparsify(model, 0.5)
    inputs = torch.randn(2, 3, 8)
    train(model, torch.optim.SGD(model.parameters(), lr=1.0), inputs)
    model.train(training)
    with torch.no_grad():
        output = model(inputs)
        make_permanent(model)
        torch.testing.assert_close(model(inputs), output)


def test_copies_and_files_of_the_whole_model():
    model = fresh(Reader)
    masks = sparsify(model, 0.5)
    inputs = torch.randn(2, 3, 6)
    expected = model(inputs)
    refresh(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(copied(inputs), expected)
        assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(copied).items())
        sparsify(copied, 0.5)
    assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(model).items())


@pytest.mark.parametrize("make", [convolutional, Tied, Reader])
def test_taking_masks_off_brings_everything_back(make):
    model = fresh(make)
    before = snapshot(model)
    sparsify(model, 0.5)
    set_masks(model, dict.fromkeys(prunable_layers(model)))
    assert_as_it_was(model, before)
    assert not any(child._forward_pre_hooks for child in model.modules())


@pytest.mark.parametrize("earlier", [False, True])
def test_all_masks_or_none(earlier):
    model = fresh(perceptron)
    if earlier:
        sparsify(model, 0.2)
    before, state = masks_of(model), snapshot(model)
    layers = prunable_layers(model)
    wrong = {layer: torch.ones(layer.shape, dtype=torch.bool) for layer in layers[:2]}
    wrong[layers[2]] = torch.ones(7, 7, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        set_masks(model, wrong)
    assert masks_of(model).keys() == before.keys()
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    if not earlier:
        assert_as_it_was(model, state)


def test_zero_whatever_the_original_holds():
    model = fresh(perceptron)
    masks = sparsify(model, 0.5)
    with torch.no_grad():
        model[0].weight_orig[~masks["0"]] = float("inf")
    assert torch.isfinite(model(torch.randn(3, 20))).all()


def test_half_precision_and_strided_layout():
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3)).to(torch.bfloat16)
    model.to(memory_format=torch.channels_last)
    sparsify(model, 0.5)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].weight.stride() == model[0].weight_orig.stride()
