"""Neurons, then weights, in one call: the same as the two calls, or nothing at all."""

from __future__ import annotations

import copy

import pytest
import torch

from networks import assert_unchanged, batches, fingerprint, mlp
from nss_prune import NSSPruner, restructure, sparsify
from nss_prune.errors import ArgumentError, NSSPruneError
from nss_prune.unstructured import make_permanent

INPUTS = torch.randn(4, 12, generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture
def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return mlp()


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return batches(48, (12,), 3)


@pytest.mark.parametrize("method", ["lamp", "global", "uniform+", "erk"])
def test_is_a_step_and_then_a_pass(model, data, method: str) -> None:
    other = copy.deepcopy(model)
    done = restructure(model, INPUTS, 0.3, method, data=data, theta=0.8)
    pruner = NSSPruner(other, INPUTS, data=data, theta=0.8)
    pruner.step()
    masks = sparsify(other, 0.3, method)
    assert done.report == pruner.report
    assert all(torch.equal(done.masks[name], mask) for name, mask in masks.items())
    torch.testing.assert_close(model(INPUTS), other(INPUTS), rtol=0, atol=0)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
def test_masked_weights_stay_zero_through_training(model, data, optimiser) -> None:
    done = restructure(model, INPUTS, 0.5, data=data, theta=0.9)
    momentum = {"momentum": 0.9} if optimiser is torch.optim.SGD else {}
    stepper = optimiser(model.parameters(), lr=0.1, weight_decay=0.1, **momentum)
    for inputs, labels in data:
        stepper.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        stepper.step()
    make_permanent(model)
    for name, mask in done.masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, mask)


def test_all_steps_are_taken(model, data) -> None:
    done = restructure(model, INPUTS, 0.0, data=data, theta=0.7, iterative_steps=3)
    assert all(mask.all() for mask in done.masks.values())
    assert model[1].out_features == int(done.masks["1"].shape[0]) < 16


@pytest.mark.parametrize(
    "arguments",
    [{"amount": 1.0}, {"amount": -0.1}, {"amount": 0.3, "method": "best"},
     {"amount": 0.3, "theta": 2.0}, {"amount": 0.3, "chain": "lamp"}],
)  # fmt: skip
def test_bad_arguments_leave_the_model_alone(model, data, arguments) -> None:
    before = fingerprint(model)
    with pytest.raises(ArgumentError):
        restructure(model, INPUTS, data=data, **arguments)
    assert_unchanged(model, before)


def test_a_failing_pass_undoes_the_removal(model, data) -> None:
    def failing(layers, keep):
        raise RuntimeError("no budget")

    before = fingerprint(model)
    with pytest.raises(NSSPruneError, match="no budget"):
        restructure(model, INPUTS, 0.3, failing, data=data, theta=0.8)
    assert_unchanged(model, before)
