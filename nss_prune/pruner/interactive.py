"""torch-pruning's view of a slice: groups to prune one by one, and the history of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.errors import GraphError
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.pruner.member_groups import group_of_members
from nss_prune.pruner.subject import Subject
from nss_prune.structures.protocol import Change
from nss_prune.surgery.metadata import apply_changes, planned_changes


def history(chosen: Slice) -> Iterator[tuple[str, bool, list[int]]]:
    """What a slice removes, as torch-pruning's history has it.

    Heads, and dimensions inside them, are named by the channels of the layer that consumes them,
    because torch-pruning does not follow a fused projection of queries, keys and values to its end.

    Yields:
        A layer, whether its output channels go or its input channels, and which.
    """
    groups = {group.name: group for group in chosen.groups}
    inside = [groups[name].consumers[0] for name in chosen.removed if groups[name].is_inside_heads]
    known = {consumer.name for consumer in inside}
    channels = chosen.removed_channels() if inside else {}
    for name, neurons in chosen.removed.items():
        group = groups[name]
        if group.is_inside_heads:  # with the heads that go, in one entry
            consumer = group.consumers[0]
            yield consumer.name, False, channels[consumer.name, "in"][1].tolist()
        elif not group.has_channels and group.consumers[0].name in known:
            continue
        elif group.has_channels or not group.consumers:
            tied = [neurons + group.size * tie for tie in range(group.ties)]
            yield name, True, torch.cat(tied).tolist()
        else:
            consumer = group.consumers[0]
            yield consumer.name, False, _channels(consumer, ~chosen.kept[name]).tolist()


def pruning_groups(
    subject: Subject, chosen: Slice, num_heads: dict[nn.Module, int]
) -> Iterator[Any]:
    """torch-pruning's groups, each with the channels to remove.

    Args:
        num_heads: Of a pruner; it follows where a group of heads is pruned, as the attributes of
            the module do.

    Raises:
        GraphError: torch-pruning would take heads apart. Nothing was yielded then.
    """
    groups = {group.name: group for group in chosen.groups}
    entries = dict(zip(chosen.removed, history(chosen), strict=True))
    parts = {
        name: Slice({name: chosen.kept[name]}, (groups[name],))
        for name in entries
        if not groups[name].has_channels
    }
    changes = {}
    for name, part in parts.items():
        if groups[name].is_uneven:
            group_of_members(subject, groups[name], ~part.kept[name])
        else:
            _check_heads(_pruning_group(subject, *entries[name]), groups[name], part, subject)
        changes[name] = planned_changes(subject.model, part, subject.adapters)
    for name, entry in entries.items():
        if groups[name].is_uneven:
            found = group_of_members(subject, groups[name], ~chosen.kept[name])
        else:
            found = _pruning_group(subject, *entry)
        if name in parts:
            _follow(found, parts[name], changes[name], num_heads, subject.model)
        yield found


def _follow(
    found: Any,
    part: Slice,
    changes: tuple[Change, ...],
    num_heads: dict[nn.Module, int],
    model: nn.Module,
) -> None:
    """Let numbers of heads follow where a group is pruned, and only there."""

    def prune(*arguments: Any, **keywords: Any) -> None:
        type(found).prune(found, *arguments, **keywords)
        apply_changes(changes)
        count_heads(num_heads, model, part)

    found.prune = prune


def count_heads(num_heads: dict[nn.Module, int], model: nn.Module, chosen: Slice) -> None:
    """Write to a pruner's ``num_heads`` how many a slice keeps.

    Scripts set the attributes of attention from this. It has the projections that the caller named,
    and the first one in any case. Query heads that share a key head are several for each neuron.
    """
    modules = dict(model.named_modules())
    for group in chosen.groups:
        if group.has_channels or group.is_inside_heads:
            continue
        kept = int(chosen.kept[group.name].sum())
        makers = [member.name for member in group.members if member.side == "out"]
        for name in dict.fromkeys([group.name, *makers]):
            module = modules.get(name)
            if module is not None and (module in num_heads or name == group.name):
                num_heads[module] = num_heads.get(module, group.size) * kept // group.size


def _pruning_group(subject: Subject, name: str, outputs: bool, channels: list[int]) -> Any:
    module = subject.model.get_submodule(name)
    functions = subject.graph.get_pruner_of_module(module)
    function = functions.prune_out_channels if outputs else functions.prune_in_channels
    return subject.graph.get_pruning_group(module, function, channels)


def _check_heads(found: Any, group: NeuronGroup, part: Slice, subject: Subject) -> None:
    """Raise where torch-pruning's group has other channels than those of the heads."""
    graph, gone = subject.graph, ~part.kept[group.name]
    removed = {
        graph._module2name.get(dependency.target.module): sorted(channels)
        for dependency, channels in found
        if graph.is_out_channel_pruning_fn(dependency.handler)
    }
    for member in group.members:
        if member.side == "out" and member.axis is None:
            wanted = _channels(member, gone).tolist()
            if removed.get(member.name) != sorted(wanted):
                raise GraphError(
                    f"torch-pruning would take the heads of {member.name} apart; call step() "
                    "without interactive=True, or name the layer in ignored_layers"
                )


def _channels(member: Member, gone: Tensor) -> Tensor:
    return member.channels[gone[member.neurons]]
