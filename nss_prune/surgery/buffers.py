"""Buffers that hold something for each channel, such as the statistics of a frozen norm.

Autograd, and so torch-pruning, sees none of them. Which layer made the channels that a module with
buffers is given shows in the autograd graph of its input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.arguments import fresh, on_input
from nss_prune.core.models import Forward, flags_kept
from nss_prune.core.nested import tensors_in
from nss_prune.graph.axes import side_width
from nss_prune.graph.neurons import Member
from nss_prune.graph.slices import Slice
from nss_prune.structures.protocol import Change

Producers = Mapping[str, tuple[str, ...]]
"""Module with buffers -> the layers that made the channels that it is given."""


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
        parameters = stack.enter_context(flags_kept(model))
        stack.enter_context(torch.enable_grad())
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(parameter.is_floating_point())
        with contextlib.suppress(Exception):
            forward(model, fresh(inputs))
    return {name: _nearest(node, made) for name, node in given.items()}


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


def _own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers with an axis, unless torch-pruning's functions change them."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {}
    return {
        name: value
        for name, value in module._buffers.items()
        if value is not None and value.is_floating_point() and value.numel() > 1
    }


def _record_output(made: dict[Any, str], name: str) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                made[tensor.grad_fn] = name

    return hook


def _record_input(given: dict[str, Any], name: str) -> Any:
    def look(module: nn.Module, inputs: Tensor) -> None:
        given.setdefault(name, inputs.grad_fn)

    return look


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
        if current in made:
            found[made[current]] = None
        else:
            waiting.extend(following for following, _ in current.next_functions)
    return tuple(found)
