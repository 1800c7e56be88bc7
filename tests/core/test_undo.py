"""After an error a model is as it was: tensors, values, children, hooks, attributes, optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from networks import assert_unchanged, cnn, fingerprint
from nss_prune.core.undo import restored_on_error, undone_on_error, values_restored
from nss_prune.errors import ArgumentError, RemovalError


def damage(model: nn.Sequential) -> None:
    """All that a removal does, and more."""
    model[0].weight = nn.Parameter(model[0].weight[:3].detach())
    model[0].out_channels = 3
    model[1] = nn.Identity()
    model[4].register_forward_hook(lambda *_: None)
    model[7].register_buffer("extra", torch.ones(1))
    model[7].note = "new"  # type: ignore[assignment]
    model.eval()
    del model[9]


def overwrite(model: nn.Sequential) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()


def fail(error: BaseException, *steps: Callable[[], None]) -> None:
    """Take some steps, then raise."""
    for step in steps:
        step()
    raise error


@pytest.mark.parametrize("values", [False, True])
def test_structure_comes_back(values: bool) -> None:
    model = cnn()
    hook = model[4].register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    with pytest.raises(KeyError), restored_on_error(model, values=values):
        fail(KeyError(), lambda: damage(model))
    assert_unchanged(model, before)
    assert not hasattr(model[7], "note")
    hook.remove()  # its handle still works
    assert not model[4]._forward_hooks


def test_values_come_back_where_they_are_asked_for() -> None:
    model = cnn()
    before = fingerprint(model)
    with pytest.raises(KeyError), restored_on_error(model, values=True) as copies:
        fail(KeyError(), lambda: overwrite(model), lambda: damage(model))
    assert_unchanged(model, before)
    assert copies.keys() == model.state_dict().keys()
    with pytest.raises(KeyError), restored_on_error(model):
        fail(KeyError(), lambda: overwrite(model))
    assert not model[0].weight.any()


def test_without_an_error_what_was_done_stays() -> None:
    model = cnn()
    with restored_on_error(model, values=True):
        overwrite(model)
    with undone_on_error(model):
        damage(model)
    assert model[0].out_channels == 3
    assert not model[4].weight.any()


def test_the_optimiser_comes_back_too() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def step() -> None:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()

    step()
    state = copy.deepcopy(optimizer.state_dict())
    before = fingerprint(model)
    with pytest.raises(KeyError), restored_on_error(model, values=True, optimizer=optimizer):
        fail(KeyError(), step)
    assert_unchanged(model, before)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for position, known in state["state"].items():
        assert torch.equal(after["state"][position]["momentum_buffer"], known["momentum_buffer"])
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(KeyError("x"), RemovalError), (ArgumentError("y"), ArgumentError)],
)
def test_errors_of_a_removal_say_so(raised: Exception, expected: type[Exception]) -> None:
    model = cnn()
    before = fingerprint(model)
    with pytest.raises(expected) as found, undone_on_error(model):
        fail(raised, lambda: damage(model))
    assert_unchanged(model, before)
    if expected is RemovalError:
        assert "KeyError: 'x'; the model was put back" in str(found.value)
        assert found.value.__cause__ is raised


def test_an_interruption_is_none_of_the_removal() -> None:
    model = cnn()
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt), undone_on_error(model):
        fail(KeyboardInterrupt(), lambda: damage(model))
    assert_unchanged(model, before)


@pytest.mark.parametrize("raises", [False, True])
def test_values_for_a_while(raises: bool) -> None:
    model = cnn()
    before = fingerprint(model)
    try:
        with values_restored(model):
            overwrite(model)
            assert not raises
    except AssertionError:
        assert raises
    assert_unchanged(model, before)
