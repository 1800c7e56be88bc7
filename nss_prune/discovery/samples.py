"""Neurons whose consumers see samples, and not tables of another kind."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import (
    Forward,
    call_model,
    evaluation,
    meta_copy,
    submodule,
    without_values,
)
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.errors import NothingToPruneError
from nss_prune.graph.neurons import NeuronMap


def readable(
    model: nn.Module, neurons: NeuronMap, example_inputs: Any, forward: Forward = call_model
) -> NeuronMap:
    """The neurons whose readers read samples; the model is left as found.

    Some read something else, such as a table of positions, and what they read has no first axis
    that grows with the batch.

    Raises:
        NothingToPruneError: No group is left.
    """
    found = neurons.without(_consumers_without_samples(model, neurons, example_inputs, forward))
    if not found.groups:
        raise NothingToPruneError(f"no layer is left to profile: {found.left_alone}")
    return found


def _consumers_without_samples(
    model: nn.Module, neurons: NeuronMap, example_inputs: Any, forward: Forward
) -> dict[str, str]:
    """Groups -> the reader that reads something else."""
    other = _other_batch(example_inputs)
    here, there = (_first_axes(model, neurons, x, forward) for x in (example_inputs, other))
    if not here or not there:  # the model takes no other batch size
        return {}
    samples, others = len(tensors_in(example_inputs)[0]), len(tensors_in(other)[0])
    return {
        group.name: f"{reader.name} reads no samples"
        for group in neurons.groups
        for reader in group.readers
        if here.get(reader.name, 0) * others != there.get(reader.name, 0) * samples
    }


def _other_batch(example_inputs: Any) -> Any:
    """The example inputs with one sample, or two where they have one."""
    samples = len(tensors_in(example_inputs)[0])

    def changed(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != samples:
            return tensor
        return tensor[:1] if samples > 1 else torch.cat([tensor, tensor])

    return map_tensors(changed, example_inputs)


def _first_axes(
    model: nn.Module, neurons: NeuronMap, inputs: Any, forward: Forward
) -> dict[str, int]:
    """Reader -> length of the first axis of what it reads; nothing where the model fails."""
    with contextlib.suppress(Exception):  # some models cannot do without values
        shapes = map_tensors(without_values, inputs)
        return _first_axes_read(meta_copy(model), neurons, shapes, forward)
    with contextlib.suppress(Exception):
        return _first_axes_read(model, neurons, inputs, forward)
    return {}


def _first_axes_read(
    model: nn.Module, neurons: NeuronMap, inputs: Any, forward: Forward
) -> dict[str, int]:
    found: dict[str, int] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            found[name] = len(arguments[0])

        return hook

    with contextlib.ExitStack() as stack:
        for name in {reader.name for group in neurons.groups for reader in group.readers}:
            handle = submodule(model, name).register_forward_pre_hook(look(name))
            stack.callback(handle.remove)
        with evaluation(model), torch.no_grad():
            forward(model, inputs)
    return found
