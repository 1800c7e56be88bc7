"""Capture the inputs of consumers, and the gradients by them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.arguments import heads_called, on_input
from nss_prune.core.models import Forward, call_model, run, submodule
from nss_prune.errors import DataError
from nss_prune.graph.axes import input_axis
from nss_prune.graph.neurons import Member, NeuronGroup


@dataclass(frozen=True)
class Reading:
    """One input of one consumer.

    Attributes:
        group: Name of the neuron group.
        activation: ``[samples, neurons, positions]``, detached.
        shape: Of the map that the positions are of; their number is its product.
    """

    group: str
    activation: Tensor
    shape: tuple[int, ...]


GradientCallback = Callable[[Reading, Tensor], None]


class Watcher:
    """Collects the readings of one forward pass, and their gradients in the backward pass.

    Args:
        groups: The neurons to watch.
        samples: Number of samples in the batch. Consumers that fold more into their first axis
            (windows, tokens) get the surplus as positions.
        on_gradient: Called in the backward pass with a reading and its gradient
            ``[samples, neurons, positions]``, which flows through that consumer alone.
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
        """Hook the consumers of ``model``; the hooks leave even when the body raises."""
        consumers: dict[str, list[tuple[NeuronGroup, Member]]] = {}
        for group in self.groups:
            for member in group.consumers:
                consumers.setdefault(member.name, []).append((group, member))
        with contextlib.ExitStack() as stack:
            stack.enter_context(heads_called(model))
            for name, entries in consumers.items():
                module = submodule(model, name)
                stack.callback(on_input(module, self._hook(name, entries)).remove)
            yield self

    def _hook(self, name: str, entries: list[tuple[NeuronGroup, Member]]) -> Any:
        def read(module: nn.Module, inputs: Tensor) -> Tensor | None:
            axis = input_axis(module)
            _check_samples(name, inputs, entries[0][1].sample_axis, self.samples)
            readings = [
                self._reading(inputs.detach(), group, member, axis) for group, member in entries
            ]
            self.readings.extend(readings)
            if self.on_gradient is None:
                return None
            tap = _tap(inputs)
            tap.register_hook(self._gradient_hook(entries, readings, axis))
            return tap

        return read

    def _gradient_hook(
        self, entries: list[tuple[NeuronGroup, Member]], readings: list[Reading], axis: int
    ) -> Callable[[Tensor], None]:
        def pass_on(gradient: Tensor) -> None:
            assert self.on_gradient is not None
            for (group, member), reading in zip(entries, readings, strict=True):
                self.on_gradient(reading, self._select(gradient, group, member, axis))

        return pass_on

    def _reading(self, values: Tensor, group: NeuronGroup, member: Member, axis: int) -> Reading:
        activation = self._select(values, group, member, axis)
        shape = map_shape(values.movedim(member.sample_axis, 0), axis, self.samples)
        repeats = activation.shape[2] // max(1, math.prod(shape))
        return Reading(group.name, activation, (repeats, *shape))

    def _select(self, values: Tensor, group: NeuronGroup, member: Member, axis: int) -> Tensor:
        """The part of ``values`` that belongs to a group, ``[samples, neurons, positions]``."""
        flat = _by_sample(values.movedim(member.sample_axis, 0), axis, self.samples)
        channels = flat.shape[1]
        if channels == group.size and _is_identity(member, channels):
            return flat
        picked = flat.index_select(1, member.channels.to(flat.device))
        return _by_neuron(picked, member.neurons, group.size)


def _tap(inputs: Tensor) -> Tensor:
    """An alias of ``inputs`` whose gradient is what flows through one consumer only."""
    if inputs.requires_grad:
        return inputs.view_as(inputs)
    return inputs.detach().requires_grad_()


def _is_identity(member: Member, channels: int) -> bool:
    return len(member.channels) == channels and torch.equal(member.channels, member.neurons)


def _by_neuron(picked: Tensor, neurons: Tensor, size: int) -> Tensor:
    """``[samples, positions of the side, positions]`` -> ``[samples, neurons, positions]``.

    A neuron that fills several positions of the side (a flattened map) gets them all as
    positions; one that the consumer does not read gets zeros.
    """
    counts = torch.bincount(neurons, minlength=size)
    repeats = int(counts.max())
    starts = counts.cumsum(0) - counts
    slots = neurons * repeats + torch.arange(len(neurons)) - starts[neurons]
    result = picked.new_zeros(picked.shape[0], size * repeats, picked.shape[2])
    result.index_copy_(1, slots.to(picked.device), picked)
    return result.reshape(picked.shape[0], size, repeats * picked.shape[2])


@contextlib.contextmanager
def watched(
    model: nn.Module,
    consumers: Mapping[str, Sequence[Member]],
    see: Callable[[str, Tensor], None],
) -> Iterator[None]:
    """Call ``see`` with the name and the input of every consumer that is called inside.

    The axis of the samples comes first.

    Args:
        consumers: Consumer -> its sides.
    """

    def hook(name: str, axis: int) -> Any:
        return lambda module, inputs: see(name, inputs.detach().movedim(axis, 0))

    with contextlib.ExitStack() as stack:
        stack.enter_context(heads_called(model))
        for name, sides in consumers.items():
            handle = on_input(submodule(model, name), hook(name, sides[0].sample_axis))
            stack.callback(handle.remove)
        yield


def map_shape(values: Tensor, axis: int, samples: int) -> tuple[int, ...]:
    """The axes that positions are flattened from, see :func:`by_sample`; channels left out."""
    others = list(values.shape[1:])
    del others[axis % values.dim() - 1]
    return (values.shape[0] // samples, *others)


def by_sample(name: str, read: Tensor, module: nn.Module, samples: int) -> Tensor:
    """What :func:`watched` sees as ``[samples, channels, positions]``.

    Raises:
        DataError: Its first axis does not hold the samples.
    """
    _check_samples(name, read, 0, samples)
    return _by_sample(read, input_axis(module), samples)


def _check_samples(name: str, inputs: Tensor, axis: int, samples: int) -> None:
    if inputs.dim() <= axis or inputs.shape[axis] % samples:
        raise DataError(
            f"{name} reads {tuple(inputs.shape)} for {samples} samples; the "
            f"{'first axis' if axis == 0 else f'axis {axis}'} of its input must hold the samples"
        )


def _by_sample(values: Tensor, axis: int, samples: int) -> Tensor:
    """``[samples, channels, positions]`` of values whose first axis holds the samples."""
    by_channel = values.movedim(axis, 1)
    channels = by_channel.shape[1]
    split = by_channel.reshape(samples, -1, channels, *by_channel.shape[2:])
    return split.movedim(1, 2).flatten(2)


class _Reached(BaseException):
    """Leaves a forward pass when it has come far enough; no Exception, so nothing handles it."""


def readings(
    model: nn.Module,
    name: str,
    inputs: Any,
    number: int,
    calls: int,
    sides: Sequence[Member],
    forward: Forward = call_model,
) -> list[Tensor]:
    """What a consumer gets in its first ``calls`` calls, samples first; the model runs no further.

    Args:
        sides: Of the consumer.
        forward: Calls the model on the inputs.
    """
    found: list[Tensor] = []

    def see(_: str, read: Tensor) -> None:
        found.append(read.clone())
        if len(found) == calls:
            raise _Reached

    with watched(model, {name: sides}, see), contextlib.suppress(_Reached):
        run(model, inputs, number, forward)
    return found
