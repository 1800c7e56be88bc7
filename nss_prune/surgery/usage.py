"""Which layers a call of a model uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nss_prune.core.models import Forward, training


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
