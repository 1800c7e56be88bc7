"""Buffers that hold something for each channel, such as the statistics of a frozen norm.

Autograd, and so torch-pruning, sees none of them. Which layer made the channels that a module with
buffers is given shows in the autograd graph of its input.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.arguments import fresh, on_input
from nss_prune.core.models import Forward, flags_kept
from nss_prune.core.nested import tensors_in
from nss_prune.graph.axes import side_width
from nss_prune.graph.neurons import Member
from nss_prune.graph.own_buffers import BufferAxis, buffer_axes
from nss_prune.graph.slices import Slice
from nss_prune.structures.protocol import Change
from nss_prune.surgery.trial_copies import working_copy

Producers = Mapping[str, tuple[str, ...]]
"""Module with buffers -> the layers that made the channels that it is given."""


class OwnBuffers:
    """The buffers of a model that hold something for each channel; looked for when asked.

    Args:
        model: A model that runs and may be called; it is left as found.
        inputs: Of a call.
        forward: Function of (model, inputs) that gives the outputs.
    """

    def __init__(self, model: nn.Module, inputs: Any, forward: Forward) -> None:
        self._called = model, inputs, forward
        self._axes: dict[str, tuple[BufferAxis, ...]] = {}

    @functools.cached_property
    def producers(self) -> Producers:
        """The layers that made what modules with buffers are given."""
        model, inputs, forward = self._called
        return producers_of_buffers(working_copy(model), inputs, forward)

    def changes(self, model: nn.Module, critical: Slice) -> Iterator[Change]:
        """The buffers of the channels that stay when a slice is cut out of a model.

        Args:
            model: The one that was looked at, or a copy.
        """
        yield from buffer_changes(model, critical, self.producers)
        for found in self._axes_of(critical):
            kept = found.kept(critical)
            if kept is not None:
                path, _, key = found.name.rpartition(".")
                module = model.get_submodule(path)
                buffer = module.get_buffer(key)
                smaller = buffer.index_select(found.axis, kept.to(buffer.device))
                yield Change(module, key, smaller)

    def _axes_of(self, critical: Slice) -> list[BufferAxis]:
        """The axes of buffers that are as wide as what goes, along which elements may go too."""
        names = _may_go(self._called[0], critical, self.producers)
        new = [name for name in names if name not in self._axes]
        if new:
            found = buffer_axes(*self._called, new)
            self._axes |= {name: tuple(a for a in found if a.name == name) for name in new}
        return [axis for name in names for axis in self._axes[name]]


def producers_of_buffers(model: nn.Module, inputs: Any, forward: Forward) -> Producers:
    """The producers of what modules with buffers are given in one call; {} where it fails."""
    names = [name for name, module in model.named_modules() if _own_buffers(module)]
    if not names:
        return {}
    made: dict[Any, str] = {}
    given: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if side_width(module, "out", None) is not None and name not in names:
                stack.callback(module.register_forward_hook(_record_output(made, name)).remove)
        for name in names:
            handle = on_input(model.get_submodule(name), _record_input(given, name))
            stack.callback(handle.remove)
        weights = _weights(model)
        parameters = stack.enter_context(flags_kept(model))
        stack.enter_context(torch.enable_grad())
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        with contextlib.suppress(Exception):
            forward(model, fresh(inputs))
    for name in names:  # an observer inside of a quantizer may be used and not called
        around = [name[: place.start()] for place in re.finditer(r"\.", name)]
        inside = next((outer for outer in reversed(around) if outer in given), name)
        given.setdefault(name, given.get(inside))
    return {name: _nearest(node, made | weights) for name, node in given.items()}


def buffer_changes(model: nn.Module, critical: Slice, producers: Producers) -> Iterator[Change]:
    """The buffers of the channels that stay when a slice is cut out of a model."""
    for name, (member, channels) in channels_given(critical, producers):
        stays = torch.ones(member.width, dtype=torch.bool)
        stays[channels] = False
        kept = stays.nonzero().flatten()
        module = model.get_submodule(name)
        for key, buffer in _own_buffers(module).items():
            axis = next((a for a, size in enumerate(buffer.shape) if size == member.width), None)
            if axis is not None:
                yield Change(module, key, buffer.index_select(axis, kept.to(buffer.device)))


def channels_given(
    critical: Slice, producers: Producers
) -> Iterator[tuple[str, tuple[Member, Tensor]]]:
    """Module with buffers -> a side that makes its channels, and those that it loses."""
    removed = critical.removed_channels() if producers else {}
    for name, layers in producers.items():
        found = [
            removed[layer, side]
            for layer in layers
            for side in ("out", "both")
            if (layer, side) in removed
        ]
        if found and all(channels.equal(found[0][1]) for _, channels in found):
            yield name, found[0]


def _may_go(model: nn.Module, critical: Slice, producers: Producers) -> list[str]:
    """Buffers of a user's own that are as wide as channels that go, but for the producers'."""
    widths = {member.width for member, _ in critical.removed_channels().values()}
    known = {name for name, layers in producers.items() if layers}
    return [
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        if name not in known and not isinstance(module, nn.modules.batchnorm._BatchNorm)
        for key, buffer in module._buffers.items()
        if buffer is not None and buffer.numel() > 1 and not widths.isdisjoint(buffer.shape)
    ]


def _own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers with an axis, unless torch-pruning's functions change them.

    Those of whole numbers count where one of floating-point numbers has their shape, as the zero
    points of a quantizer have that of its scales: others are indices.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {}
    wide = {
        name: value
        for name, value in module._buffers.items()
        if value is not None and value.numel() > 1
    }
    shapes = {value.shape for value in wide.values() if value.is_floating_point()}
    return {name: value for name, value in wide.items() if value.shape in shapes}


def _record_output(made: dict[Any, str], name: str) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                made[tensor.grad_fn] = name

    return hook


def _record_input(given: dict[str, Any], name: str) -> Any:
    def look(module: nn.Module, inputs: Tensor) -> None:
        given.setdefault(name, inputs if inputs.grad_fn is None else inputs.grad_fn)

    return look


def _weights(model: nn.Module) -> dict[Any, str]:
    """Weight -> its layer: a quantizer may be given a weight and no channels."""
    return {
        module._parameters["weight"]: name
        for name, module in model.named_modules()
        if module._parameters.get("weight") is not None
        and side_width(module, "out", None) is not None
    }


def _nearest(node: Any, made: Mapping[Any, str]) -> tuple[str, ...]:
    """The layers that made what comes to an autograd node, with no layer between."""
    found: dict[str, None] = {}
    seen = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        current = getattr(current, "variable", current)  # of a leaf: the weight itself
        if current in made:
            found[made[current]] = None
        elif not isinstance(current, Tensor):
            waiting.extend(following for following, _ in current.next_functions)
    return tuple(found)
