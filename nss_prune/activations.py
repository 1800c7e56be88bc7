"""What the readers read, captured.

The activation of a neuron is what its readers take in, so the norm, the activation function, the
pooling and the gate between a layer and its readers all count, and removing a neuron is the same
as zeroing its activation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.errors import DataError, NothingToPruneError
from nss_prune.neurons import (
    Forward,
    Member,
    NeuronGroup,
    NeuronMap,
    call_model,
    evaluation,
    input_axis,
    map_tensors,
    skeleton,
    submodule,
    tensors_in,
    without_values,
)


@dataclass(frozen=True)
class Reading:
    """One input of one reader.

    Attributes:
        group: Name of the neuron group.
        activation: ``[samples, neurons, positions]``, detached.
    """

    group: str
    activation: Tensor


GradientCallback = Callable[[Reading, Tensor], None]


class Watcher:
    """Collects the readings of one forward pass, and their gradients in the backward pass.

    Args:
        groups: The neurons to watch.
        samples: Number of samples in the batch. Readers that fold more into their first axis
            (windows, tokens) get the surplus as positions.
        on_gradient: Called in the backward pass with a reading and its gradient
            ``[samples, neurons, positions]``, which flows through that reader alone.
    """

    def __init__(
        self,
        groups: Sequence[NeuronGroup],
        samples: int,
        on_gradient: GradientCallback | None = None,
    ) -> None:
        self.groups = groups
        self.samples = samples
        self.on_gradient = on_gradient
        self.readings: list[Reading] = []

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[Watcher]:
        """Hook the readers of ``model``; the hooks leave even when the body raises."""
        readers: dict[str, list[tuple[NeuronGroup, Member]]] = {}
        for group in self.groups:
            for member in group.readers:
                readers.setdefault(member.name, []).append((group, member))
        with contextlib.ExitStack() as stack:
            for name, entries in readers.items():
                module = submodule(model, name)
                handle = module.register_forward_pre_hook(self._hook(name, entries))
                stack.callback(handle.remove)
            yield self

    def _hook(self, name: str, entries: list[tuple[NeuronGroup, Member]]) -> Any:
        def read(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            inputs: Tensor = arguments[0]
            axis = input_axis(module)
            if inputs.shape[0] % self.samples:
                raise DataError(
                    f"{name} reads {tuple(inputs.shape)} for {self.samples} samples; the first "
                    "axis of its input must hold the samples"
                )
            readings = [
                Reading(group.name, self._select(inputs.detach(), group, member, axis))
                for group, member in entries
            ]
            self.readings.extend(readings)
            if self.on_gradient is None:
                return None
            tap = _tap(inputs)
            tap.register_hook(self._gradient_hook(entries, readings, axis))
            return (tap, *arguments[1:])

        return read

    def _gradient_hook(
        self, entries: list[tuple[NeuronGroup, Member]], readings: list[Reading], axis: int
    ) -> Callable[[Tensor], None]:
        def pass_on(gradient: Tensor) -> None:
            assert self.on_gradient is not None
            for (group, member), reading in zip(entries, readings, strict=True):
                self.on_gradient(reading, self._select(gradient, group, member, axis))

        return pass_on

    def _select(self, values: Tensor, group: NeuronGroup, member: Member, axis: int) -> Tensor:
        """The part of ``values`` that belongs to a group, ``[samples, neurons, positions]``."""
        by_channel = values.movedim(axis, 1)
        channels = by_channel.shape[1]
        by_channel = by_channel.reshape(self.samples, -1, channels, *by_channel.shape[2:])
        flat = by_channel.movedim(1, 2).flatten(2)
        if channels == group.size and _is_identity(member, channels):
            return flat
        picked = flat.index_select(1, member.channels.to(flat.device))
        return _by_neuron(picked, member.neurons, group.size)


def _tap(inputs: Tensor) -> Tensor:
    """An alias of ``inputs`` whose gradient is what flows through one reader only."""
    if inputs.requires_grad:
        return inputs.view_as(inputs)
    return inputs.detach().requires_grad_()


def _is_identity(member: Member, channels: int) -> bool:
    return len(member.channels) == channels and torch.equal(member.channels, member.neurons)


def _by_neuron(picked: Tensor, neurons: Tensor, size: int) -> Tensor:
    """``[samples, positions of the side, positions]`` -> ``[samples, neurons, positions]``.

    A neuron that fills several positions of the side (a flattened map) gets them all as
    positions; one that the reader does not read gets zeros.
    """
    counts = torch.bincount(neurons, minlength=size)
    repeats = int(counts.max())
    starts = counts.cumsum(0) - counts
    slots = neurons * repeats + torch.arange(len(neurons)) - starts[neurons]
    result = picked.new_zeros(picked.shape[0], size * repeats, picked.shape[2])
    result.index_copy_(1, slots.to(picked.device), picked)
    return result.reshape(picked.shape[0], size, repeats * picked.shape[2])


def readable(
    model: nn.Module, neurons: NeuronMap, example_inputs: Any, forward: Forward = call_model
) -> NeuronMap:
    """The neurons whose readers read samples; the model is left as found.

    Some read something else, such as a table of positions, and what they read has no first axis
    that grows with the batch.

    Raises:
        NothingToPruneError: No group is left.
    """
    found = neurons.without(_readers_without_samples(model, neurons, example_inputs, forward))
    if not found.groups:
        raise NothingToPruneError(f"no layer is left to profile: {found.left_alone}")
    return found


def _readers_without_samples(
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
        return _first_axes_read(skeleton(model), neurons, shapes, forward)
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
