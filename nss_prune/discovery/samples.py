"""Neurons whose consumers see samples, along which axis, and not tables of another kind."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.arguments import heads_called, on_input
from nss_prune.core.models import (
    Forward,
    call_model,
    evaluation,
    meta_copy,
    submodule,
    without_values,
)
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.core.shapes import ShapesAlone
from nss_prune.errors import NothingToPruneError
from nss_prune.graph.neurons import NeuronGroup, NeuronMap


def readable(
    model: nn.Module, neurons: NeuronMap, example_inputs: Any, forward: Forward = call_model
) -> NeuronMap:
    """The neurons whose consumers see samples, with the axis of the samples of each.

    The model is left as found. Some consumers see something else, such as a table of positions:
    no axis of their input grows with the batch.

    Raises:
        NothingToPruneError: No group is left.
    """
    axes = _sample_axes(model, neurons, example_inputs, forward)
    groups = tuple(_with_axes(group, axes) for group in neurons.groups)
    reasons = {
        group.name: f"{consumer.name} reads no samples"
        for group in groups
        for consumer in group.consumers
        if axes.get(consumer.name, 0) is None
    }
    found = replace(neurons, groups=groups).without(reasons)
    if not found.groups:
        raise NothingToPruneError(f"no layer is left to profile: {found.left_alone}")
    return found


def _with_axes(group: NeuronGroup, axes: Mapping[str, int | None]) -> NeuronGroup:
    members = tuple(
        replace(member, sample_axis=axes.get(member.name, 0) or 0)
        if member.side == "in"
        else member
        for member in group.members
    )
    return replace(group, members=members)


def _sample_axes(
    model: nn.Module, neurons: NeuronMap, example_inputs: Any, forward: Forward
) -> dict[str, int | None]:
    """Consumer -> the first axis of its input that grows with the batch, or None."""
    other = _other_batch(example_inputs)
    here, there = (_shapes_seen(model, neurons, x, forward) for x in (example_inputs, other))
    if not here or not there:  # the model takes no other batch size
        return {}
    samples, others = len(tensors_in(example_inputs)[0]), len(tensors_in(other)[0])
    names = {consumer.name for group in neurons.groups for consumer in group.consumers}
    return {
        name: next(
            (
                axis
                for axis, (one, two) in enumerate(
                    zip(here.get(name, ()), there.get(name, ()), strict=False)
                )
                if one * others == two * samples and one != two
            ),
            None,
        )
        for name in names
    }


def _other_batch(example_inputs: Any) -> Any:
    """The example inputs with one sample, or two where they have one."""
    samples = len(tensors_in(example_inputs)[0])

    def changed(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != samples:
            return tensor
        return tensor[:1] if samples > 1 else torch.cat([tensor, tensor])

    return map_tensors(changed, example_inputs)


def _shapes_seen(
    model: nn.Module, neurons: NeuronMap, inputs: Any, forward: Forward
) -> dict[str, torch.Size]:
    """Consumer -> shape of its input; nothing where the model fails."""
    with contextlib.suppress(Exception):  # some models cannot do without values
        shapes = map_tensors(without_values, inputs)
        with ShapesAlone():
            return _shapes_of_inputs(meta_copy(model), neurons, shapes, forward)
    with contextlib.suppress(Exception):
        return _shapes_of_inputs(model, neurons, inputs, forward)
    return {}


def _shapes_of_inputs(
    model: nn.Module, neurons: NeuronMap, inputs: Any, forward: Forward
) -> dict[str, torch.Size]:
    found: dict[str, torch.Size] = {}

    def look(name: str) -> Any:
        def record(module: nn.Module, inputs: Tensor) -> None:
            found[name] = inputs.shape

        return record

    with contextlib.ExitStack() as stack:
        stack.enter_context(heads_called(model))
        for name in {consumer.name for group in neurons.groups for consumer in group.consumers}:
            stack.callback(on_input(submodule(model, name), look(name)).remove)
        with evaluation(model), torch.no_grad():
            forward(model, inputs)
    return found
