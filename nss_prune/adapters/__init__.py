"""Structures whose neurons are not single channels: one adapter each.

An adapter looks at a module and says which neurons lie inside it; after a removal it says which
attributes must follow. Adapters are arguments, so for a model of one's own::

    adapted(model, neurons, (MyAdapter(), *ADAPTERS))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from nss_prune.adapters.attention import Attention
from nss_prune.adapters.gated import GatedUnit
from nss_prune.adapters.protocol import Adapter, Change
from nss_prune.neurons import NeuronGroup, NeuronMap
from nss_prune.slicing import Slice

ADAPTERS: tuple[Adapter, ...] = (Attention(), Attention(head_first=True), GatedUnit())
"""The structures known; the first adapter that claims a module has it."""

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Attention",
    "Change",
    "GatedUnit",
    "adapted",
    "apply_changes",
    "claims",
    "joined",
    "planned_changes",
]

Claim = tuple[nn.Module, Adapter, tuple[NeuronGroup, ...]]
"""A module, an adapter that claims it, and the neurons inside."""


def adapted(
    model: nn.Module,
    neurons: NeuronMap,
    adapters: Sequence[Adapter] = ADAPTERS,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
) -> NeuronMap:
    """The map with the neurons that the adapters know, by structure alone.

    Where two adapters claim a module, the first has it. Use
    :func:`nss_prune.adapters.trial.adapted_on_trial` to have each claim tried first.

    Args:
        ignored: Modules whose output channels must stay, and parameters.
    """
    found: dict[nn.Module, tuple[NeuronGroup, ...]] = {}
    for module, _, groups in claims(model, adapters, ignored):
        found.setdefault(module, groups)
    return joined(model, neurons, [group for groups in found.values() for group in groups])


def claims(
    model: nn.Module,
    adapters: Sequence[Adapter] = ADAPTERS,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
) -> Iterator[Claim]:
    """What the adapters claim, in the order of the modules and then of the adapters.

    Nothing is claimed that is ignored, or that modules elsewhere in the model use as well.
    """
    stay = _outputs_to_keep(model, ignored)
    for name, module in model.named_modules():
        for adapter in adapters:
            groups = adapter.groups(name, module)
            if not groups or _makers(groups) & stay or _used_outside(model, module, groups):
                continue
            yield module, adapter, groups


def joined(model: nn.Module, neurons: NeuronMap, groups: Sequence[NeuronGroup]) -> NeuronMap:
    """The map with ``groups`` in place of those that share a side of a module with them.

    Of ``groups`` that share a side the first stays.
    """
    claimed: dict[tuple[str, str], str] = {}
    added = []
    for group in groups:
        if not _roots_shared(group, claimed):
            added.append(group)
            claimed.update({(member.name, member.side): group.name for member in group.members})
    clashes = {group.name: _roots_shared(group, claimed) for group in neurons.groups}
    rest = neurons.without(
        {
            name: f"shares channels with the neurons of {', '.join(roots)}"
            for name, roots in clashes.items()
            if roots
        }
    )
    makers = _makers(added)
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    order = {name: position for position, name in enumerate(names)}
    return replace(
        rest,
        groups=tuple(sorted([*rest.groups, *added], key=lambda group: order[group.name])),
        left_alone={name: why for name, why in rest.left_alone.items() if name not in makers},
        left_alone_sizes={
            name: size for name, size in rest.left_alone_sizes.items() if name not in makers
        },
    )


def _roots_shared(group: NeuronGroup, claimed: Mapping[tuple[str, str], str]) -> list[str]:
    """The groups that have claimed a side of a member of a group."""
    sides = [(member.name, member.side) for member in group.members]
    return sorted({claimed[side] for side in sides if side in claimed})


def planned_changes(
    model: nn.Module, critical: Slice, adapters: Sequence[Adapter] = ADAPTERS
) -> tuple[Change, ...]:
    """What must change besides the channels when a slice is cut out of a model.

    Ask before the removal, then :func:`apply_changes`.
    """
    removed = critical.removed
    going = {group.name: group for group in critical.groups if group.name in removed}
    if not going:
        return ()
    return tuple(
        change
        for name, module in model.named_modules()
        for adapter in adapters
        for group in adapter.groups(name, module)
        if group.name in going and _same(group, going[group.name])
        for change in adapter.changes(module, group, critical.kept[group.name])
    )


def apply_changes(changes: Iterable[Change]) -> None:
    """Set the attributes."""
    for change in changes:
        setattr(change.module, change.name, change.value)


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


def _makers(groups: Iterable[NeuronGroup]) -> set[str]:
    """Names of the modules and parameters that make the neurons or pass them on."""
    return {member.name for group in groups for member in group.members if member.side != "in"}


def _outputs_to_keep(model: nn.Module, ignored: Sequence[nn.Module | nn.Parameter]) -> set[str]:
    """Names of the modules and parameters whose channels must stay."""
    modules = {
        child for layer in ignored if isinstance(layer, nn.Module) for child in layer.modules()
    }
    parameters = {id(layer) for layer in ignored if isinstance(layer, nn.Parameter)}
    return {name for name, module in model.named_modules() if module in modules} | {
        name for name, value in model.named_parameters() if id(value) in parameters
    }


def _used_outside(model: nn.Module, module: nn.Module, groups: Iterable[NeuronGroup]) -> bool:
    """Whether modules outside of ``module`` use a layer or parameter of its neurons as well."""
    names = {member.name for group in groups for member in group.members}
    everything = list(model.named_parameters(remove_duplicate=False))
    found = {parameter for name, parameter in everything if name in names}
    for name, layer in model.named_modules(remove_duplicate=False):
        if name in names:
            found.update(layer.parameters())
    inside = tuple(
        f"{name}." if name else ""
        for name, other in model.named_modules(remove_duplicate=False)
        if other is module
    )
    return any(parameter in found and not name.startswith(inside) for name, parameter in everything)
