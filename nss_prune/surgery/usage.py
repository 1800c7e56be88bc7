"""Which layers a call of a model uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nss_prune.core.arguments import fresh
from nss_prune.core.models import Forward, training
from nss_prune.errors import RemovalError


@contextlib.contextmanager
def layers_used(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The layers with parameters that are called inside."""
    used: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        for layer in model.modules():
            if has_parameters(layer):
                hook = layer.register_forward_pre_hook(lambda called, _: used.add(called))
                stack.callback(hook.remove)
        yield used


def has_parameters(layer: nn.Module) -> bool:
    return any(parameter is not None for parameter in layer._parameters.values())


def trains_any(
    model: nn.Module, layers: set[nn.Module], example_inputs: Any, forward: Forward
) -> bool:
    """Whether a call in training mode works, and uses some of these layers."""
    with layers_used(model) as used, training(model), torch.no_grad():
        try:
            forward(model, example_inputs)
        except Exception:
            return False
    return not used.isdisjoint(layers)


def resting(model: nn.Module, used: set[nn.Module]) -> set[nn.Module]:
    """The layers with parameters that are not among those that a call uses."""
    return {layer for layer in model.modules() if has_parameters(layer)} - used


def has_own_buffers(model: nn.Module) -> bool:
    """Whether a module that is no norm has a buffer of more than one value."""
    return any(
        buffer is not None and buffer.numel() > 1
        for module in model.modules()
        if not isinstance(module, nn.modules.batchnorm._NormBase)
        for buffer in module._buffers.values()
    )


def trains_others(
    model: nn.Module, layers: set[nn.Module], example_inputs: Any, forward: Forward
) -> bool:
    """Whether a call in training mode works, and may use what one in evaluation mode does not.

    That is some layers, or buffers of a user's own. The model may change.

    Args:
        layers: Those that rest in evaluation mode.
    """
    if not has_own_buffers(model):
        return trains_any(model, layers, example_inputs, forward)
    try:
        train_once(model, example_inputs, forward)
    except RemovalError:
        return False
    return True


def train_once(model: nn.Module, inputs: Any, forward: Forward) -> None:
    """Call a smaller model in training mode.

    Raises:
        RemovalError: It does not run.
    """
    try:
        with training(model), torch.no_grad():
            forward(model, fresh(inputs))
    except Exception as error:
        raise RemovalError(
            f"the smaller model does not run in training mode: {error}; name the layer in "
            "ignored_layers"
        ) from error
