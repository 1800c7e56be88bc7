"""Layers that share a parameter, such as an embedding and the head of a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from nss_prune.core.models import submodule
from nss_prune.errors import NothingToPruneError
from nss_prune.graph.axes import parameter_axes
from nss_prune.graph.neurons import Member, NeuronGroup, NeuronMap


def shared_parameters(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one tensor in several modules."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, value in module._parameters.items():
            if value is not None:
                found.setdefault(id(value), []).append(f"{name}.{key}" if name else key)
    return [names for names in found.values() if len(names) > 1]


def merged_by_ties(model: nn.Module, neurons: NeuronMap) -> NeuronMap:
    """The map with groups merged that cut the same axis of a shared parameter.

    Where one layer that shares it is cut and another is not, or in another order, its groups are
    left alone.

    Raises:
        NothingToPruneError: No group is left.
    """
    merged = neurons
    for names in shared_parameters(model):
        merged = _merged(model, merged, names)
    if neurons.groups and not merged.groups:
        raise NothingToPruneError(f"no layer is left to prune: {merged.left_alone}")
    return merged


def _merged(model: nn.Module, neurons: NeuronMap, names: Sequence[str]) -> NeuronMap:
    for axis in (0, 1):
        cuts = [_cuts(model, neurons.groups, name, axis) for name in names]
        groups = {group.name: group for found in cuts for group, _ in found}
        if not groups:
            continue
        pairs = [found[0] for found in cuts if len(found) == 1]
        group, member = pairs[0] if pairs else next(found[0] for found in cuts if found)
        alike = len(pairs) == len(cuts) and all(
            (other.size, other.ties) == (group.size, group.ties)
            and its.neurons.equal(member.neurons)
            and its.channels.equal(member.channels)
            for other, its in pairs
        )
        if alike:
            neurons = _joined(neurons, [other.name for other, _ in pairs])
        else:
            reason = f"{names[0]} and {names[1]} are one tensor, which only one of them would cut"
            neurons = neurons.without(dict.fromkeys(groups, reason))
    return neurons


def _cuts(
    model: nn.Module, groups: Sequence[NeuronGroup], name: str, axis: int
) -> list[tuple[NeuronGroup, Member]]:
    """The groups that cut an axis of a parameter, each with the side of its layer."""
    return [
        (group, member)
        for group in groups
        for member in group.members
        if axis in _axes(model, member, name)
    ]


def _axes(model: nn.Module, member: Member, name: str) -> Iterator[int]:
    """The axes of a parameter that shrink with a member."""
    if member.axis is not None:
        if member.name == name:
            yield member.axis
        return
    layer, _, key = name.rpartition(".")
    if member.name != layer:
        return
    module = submodule(model, layer)
    made, read = parameter_axes(module).get(key, (None, None))
    axis = read if member.side == "in" else made
    value: Tensor | None = module._parameters.get(key)
    if axis is not None and value is not None:
        yield axis % value.dim()


def _joined(neurons: NeuronMap, names: Sequence[str]) -> NeuronMap:
    """The map with some groups as one, under the name of the first."""
    parts = [group for group in neurons.groups if group.name in names]
    if len(parts) < 2:
        return neurons
    members: dict[tuple[str, str], Member] = {}
    for group in parts:
        for member in group.members:
            members.setdefault((member.name, member.side), member)
    joined = replace(parts[0], members=tuple(members.values()))
    rest = [
        joined if group is parts[0] else group
        for group in neurons.groups
        if group is parts[0] or group.name not in names
    ]
    return replace(neurons, groups=tuple(rest))
