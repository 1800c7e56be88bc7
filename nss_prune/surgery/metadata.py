"""Attributes that follow when neurons go, such as a module's number of heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.structures.dimensions import HEAD_DIMENSIONS
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.multihead import narrowed
from nss_prune.structures.protocol import Adapter, Change
from nss_prune.surgery.buffers import OwnBuffers
from nss_prune.surgery.widths import width_changes


def planned_changes(
    model: nn.Module,
    critical: Slice,
    adapters: Sequence[Adapter] = ADAPTERS,
    *,
    widths: bool = True,
    buffers: OwnBuffers | None = None,
) -> tuple[Change, ...]:
    """What must change besides the channels when a slice is cut out of a model.

    Ask before the removal, then :func:`apply_changes`.

    Args:
        widths: Whether attributes that say how wide a module is change too.
        buffers: Those that hold something for each channel.
    """
    removed = critical.removed
    going = {group.name: group for group in critical.groups if group.name in removed}
    if not going:
        return ()
    around = _paths_around(going)
    of_adapters = [
        change
        for name, module in model.named_modules()
        if name in around
        for adapter in (*adapters, HEAD_DIMENSIONS)
        for group in adapter.groups(name, module)
        if group.name in going and _same(group, going[group.name])
        for change in adapter.changes(module, group, critical.kept[group.name])
    ]
    of_adapters += narrowed(model, critical)
    done = {(change.module, change.name) for change in of_adapters}
    producers = None if buffers is None else buffers.producers
    of_widths = width_changes(model, critical, producers) if widths else ()
    others = [change for change in of_widths if (change.module, change.name) not in done]
    followers = () if buffers is None else buffers.changes(model, critical)
    others += [change for change in followers if (change.module, change.name) not in done]
    return (*of_adapters, *others)


def apply_changes(changes: Iterable[Change]) -> None:
    """Set the attributes."""
    for change in changes:
        change.apply()


def _paths_around(layers: Iterable[str]) -> set[str]:
    """Names of some layers and of the modules that they lie in; "" is the model."""
    return {""} | {
        name[:end]
        for name in layers
        for end in (*(place for place, letter in enumerate(name) if letter == "."), len(name))
    }


def _same(group: NeuronGroup, other: NeuronGroup) -> bool:
    """Whether two groups have the same neurons on the same sides."""
    if (group.size, len(group.members)) != (other.size, len(other.members)):
        return False
    return all(
        (mine.name, mine.side, mine.axis, mine.width) == (its.name, its.side, its.axis, its.width)
        and mine.channels.equal(its.channels)
        and mine.neurons.equal(its.neurons)
        for mine, its in zip(group.members, other.members, strict=True)
    )
