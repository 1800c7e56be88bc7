"""Buffers that a forward function uses element by element with channels, wherever they are.

Such as a running mean that a model keeps itself. torch-pruning sees no buffers; labels of
channels (:mod:`nss_prune.graph.labels`) that meet those of a buffer's elements tell which go
together. Buffers that training alone uses are found by a call in training mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import Forward, clone, evaluation, meta_copy, training, without_values
from nss_prune.core.nested import map_tensors
from nss_prune.graph.coupled import Mode, components, constant_but, labelled_call
from nss_prune.graph.labels import Labels, along
from nss_prune.graph.neurons import Side
from nss_prune.graph.sides import LabelledSide
from nss_prune.graph.slices import Slice


@dataclass(frozen=True)
class BufferAxis:
    """The axis of a buffer that carries channels.

    Attributes:
        name, axis: Of the buffer.
        labels: Of its elements along the axis, ``[length]``.
        sides: (layer, side) -> labels of its channels, ``[channels]``.
    """

    name: str
    axis: int
    labels: Tensor
    sides: Mapping[tuple[str, Side], Tensor]

    def kept(self, critical: Slice) -> Tensor | None:
        """Positions along the axis that stay, ``[kept]``; None where all do."""
        gone = [
            self.sides[member.name, member.side][channels]
            for member, channels in critical.removed_channels().values()
            if (member.name, member.side) in self.sides and member.axis is None
        ]
        if not gone:
            return None
        stays = ~torch.isin(self.labels, torch.cat(gone))
        return None if bool(stays.all()) else stays.nonzero().flatten()


def buffer_axes(
    model: nn.Module, inputs: Any, forward: Forward, names: Collection[str]
) -> tuple[BufferAxis, ...]:
    """The axes of some buffers that carry channels, found in a call of a copy.

    Args:
        names: Of the buffers.
    """
    found: dict[str, BufferAxis] = {}
    for mode in (evaluation, training):
        left = [name for name in names if name not in found]
        if left:
            found.update({axis.name: axis for axis in _found(model, inputs, forward, left, mode)})
    return tuple(found.values())


def _found(
    model: nn.Module, inputs: Any, forward: Forward, names: Collection[str], mode: Mode
) -> list[BufferAxis]:
    """Without values where the model runs like that; none where it does not run."""
    with contextlib.suppress(Exception):
        given = map_tensors(without_values, inputs)
        return list(_axes(meta_copy(model), given, forward, names, mode))
    with contextlib.suppress(Exception):
        copy = clone(model, lambda tensor: tensor.detach().clone())
        return list(_axes(copy, inputs, forward, names, mode))
    return []


def _axes(
    copy: nn.Module, inputs: Any, forward: Forward, names: Collection[str], mode: Mode
) -> Iterator[BufferAxis]:
    buffers = {name: value for name, value in copy.named_buffers() if name in names}
    labels = Labels(buffers.values())
    layers, _ = labelled_call(copy, inputs, forward, labels, mode)
    component = components(labels.count, labels.edges)
    sides = {
        (side.name, side.side): component[side.labels]
        for side in _makers(side for layer in layers for side in layer.sides)
    }
    channels = torch.cat(list(sides.values())) if sides else torch.empty(0)
    for name, buffer in buffers.items():
        if id(buffer) not in labels.buffers:
            continue
        of_elements = component[labels.buffers[id(buffer)][1]]
        axes = [axis for axis in range(of_elements.dim()) if constant_but(of_elements, axis)]
        if len(axes) == 1:
            line = along(of_elements, axes[0])
            if bool(torch.isin(line, channels).any()):
                yield BufferAxis(name, axes[0], line, sides)


def _makers(sides: Iterator[LabelledSide]) -> Iterator[LabelledSide]:
    return (side for side in sides if side.axis is None and side.side != "in")
