"""torch-pruning's view of a slice: groups to prune one by one, and the history of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune.core.undo import undone_on_error
from nss_prune.errors import GraphError
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.graph.ties import shared_parameters
from nss_prune.pruner.member_groups import dependency_of, group_of_members
from nss_prune.pruner.subject import Subject
from nss_prune.structures.protocol import Change
from nss_prune.surgery.buffers import OwnBuffers
from nss_prune.surgery.cut import cut
from nss_prune.surgery.metadata import apply_changes, planned_changes
from nss_prune.surgery.plan import plan_removal

Gone = dict[tuple[str, str, "int | None"], Tensor]
"""(layer, side, axis) -> True for the channels that are removed, ``[channels]``."""


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
    subject: Subject, chosen: Slice, num_heads: dict[nn.Module, int], unsaid: Sequence[str]
) -> Iterator[Any]:
    """torch-pruning's groups, each with the channels to remove.

    Args:
        num_heads: Of a pruner; it follows where a group of heads is pruned, as the attributes of
            the module do.
        unsaid: Groups whose loss torch-pruning's history cannot say.

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
    changes: dict[str, tuple[Change, ...]] = {}
    buffers = OwnBuffers(subject.model, subject.example_inputs, subject.forward)
    wrong = {name for name in entries if not is_described(subject, groups[name], entries[name])}
    apart = wrong | _tied(subject.model, [groups[name] for name in entries])
    _refuse_shared(chosen, apart)
    gone: Gone = {}
    for name in entries.keys() - apart - parts.keys():
        part = Slice({name: chosen.kept[name]}, (groups[name],))
        changes[name] = tuple(buffers.changes(subject.model, part))
    for name, part in parts.items():
        if name in apart:
            continue
        if groups[name].is_uneven:
            group_of_members(subject, groups[name], ~part.kept[name])
        else:
            _check_heads(_pruning_group(subject, *entries[name]), groups[name], part, subject)
        changes[name] = planned_changes(subject.model, part, subject.adapters)
    for name, entry in entries.items():
        if name in apart:
            part = Slice({name: chosen.kept[name]}, (groups[name],))
            recorded = None if name in unsaid else entry
            yield _removal(subject, part, recorded, num_heads, buffers, gone)
            continue
        if groups[name].is_uneven:
            found = group_of_members(subject, groups[name], ~chosen.kept[name])
        else:
            found = _pruning_group(subject, *entry)
        if name in parts or changes[name]:
            part = Slice({name: chosen.kept[name]}, (groups[name],))
            _follow(found, part, changes[name], num_heads, subject.model)
        yield found


def _is_apart(subject: Subject, group: NeuronGroup) -> bool:
    """Whether layers of a group are none of torch-pruning's graph, or recurrent.

    Its history has no entry for such a group.
    """
    modules = dict(subject.model.named_modules())
    layers = [modules[member.name] for member in group.members if member.axis is None]
    known = {} if subject.graph is None else subject.graph.module2node
    return any(isinstance(layer, nn.RNNBase) or layer not in known for layer in layers)


def is_described(
    subject: Subject, group: NeuronGroup, entry: tuple[str, bool, list[int]], by: Any = sorted
) -> bool:
    """Whether torch-pruning's group for an entry of the history has the channels of ours.

    Args:
        by: What is compared of the channels of a side; ``len`` where any as many will do.
    """
    if _is_apart(subject, group):
        return False
    if not group.followed:
        return True
    try:
        found = _pruning_group(subject, *entry)
    except Exception:  # of its index mappings
        return False
    graph, gone = subject.graph, set(entry[2])
    theirs: dict[tuple[Any, str], set[int]] = {}
    for dependency, channels in found:
        side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
        name = graph._module2name.get(dependency.target.module)
        theirs.setdefault((name, side), set()).update(channels)
    root = next(m for m in group.members if m.name == group.name and m.side == "out")
    lost = torch.zeros(group.size, dtype=torch.bool)
    lost[[int(n) for c, n in zip(root.channels, root.neurons, strict=True) if int(c) in gone]] = (
        True
    )
    return all(
        by(_channels(member, lost).tolist())
        in (by(_below(member.width, theirs.get((member.name, side), set()))) for side in sides)
        for member in group.members
        if member.axis is None
        for sides in ((member.side,) if member.side != "both" else ("out", "in"),)
    )


def _below(width: int, channels: set[int]) -> set[int]:
    """Those that there are: torch-pruning does nothing to others that it may name."""
    return {channel for channel in channels if channel < width}


def not_replayed(subject: Subject, chosen: Slice) -> list[str]:
    """The groups of a slice whose loss torch-pruning's history cannot say.

    It would remove other numbers of channels, or leave out buffers and sizes that go with them.
    Which channels does not matter: a model's weights are loaded after its history.
    """
    if subject.graph is None:
        return []
    groups = {group.name: group for group in chosen.groups}
    buffers = OwnBuffers(subject.model, subject.example_inputs, subject.forward)
    unflattens = any(isinstance(module, nn.Unflatten) for module in subject.model.modules())
    found = []
    for name in chosen.removed:
        part = Slice({name: chosen.kept[name]}, (groups[name],))
        (entry,) = history(part)
        changes = list(buffers.changes(subject.model, part))
        if unflattens:
            changes += (
                change
                for change in planned_changes(subject.model, part, subject.adapters)
                if isinstance(change.module, nn.Unflatten)
            )
        if changes or not is_described(subject, groups[name], entry, len):
            found.append(name)
    return found


def _tied(model: nn.Module, groups: Sequence[NeuronGroup]) -> set[str]:
    """Names of groups with layers that share a parameter, which torch-pruning would part."""
    names = {name for names in shared_parameters(model) for name in names}
    tied = {name.rpartition(".")[0] for name in names}
    return {
        group.name
        for group in groups
        if any(member.axis is None and member.name in tied for member in group.members)
    }


def _refuse_shared(chosen: Slice, apart: set[str]) -> None:
    """Raise where a group that is removed by itself shares a layer's side with one that is not."""
    sides = Counter(
        (member.name, member.side)
        for group in chosen.groups
        if group.name in chosen.removed and group.name not in apart
        for member in group.members
    )
    for group in chosen.groups:
        if group.name in apart and any(sides[m.name, m.side] for m in group.members):
            raise GraphError(
                f"torch-pruning does not follow the channels of {group.name}, which lie beside "
                "those of other layers; call step() without interactive=True"
            )


def _removal(
    subject: Subject,
    part: Slice,
    entry: tuple[str, bool, list[int]] | None,
    num_heads: dict[nn.Module, int],
    buffers: OwnBuffers,
    removed: Gone,
) -> Any:
    """A group of torch-pruning's whose ``prune`` removes what a slice of one group does not keep.

    It shows the layers that torch-pruning's graph has.

    Args:
        entry: Of the history; None where it cannot say this.
        removed: What other such groups have removed, to which this one adds.
    """
    (group,), model = part.groups, subject.model
    made = tp.dependency.Group()
    made._DG = subject.graph
    gone = ~part.kept[group.name]
    for member in group.members:
        layer = None if member.axis is not None else model.get_submodule(member.name)
        if layer in subject.graph.module2node:
            made.add_dep(dependency_of(subject, member), _channels(member, gone).tolist())
            made[-1].root_idxs = gone.nonzero().flatten().tolist()

    def prune(*arguments: Any, **keywords: Any) -> None:
        with undone_on_error(model):
            left = Slice(part.kept, (_shifted(group, removed),))
            steps = plan_removal(left, model)
            cut(model, left, steps, subject.adapters, buffers, subject.customized_pruners)
        for member in group.members:
            mask = removed.setdefault(_side(member), torch.zeros(member.width, dtype=torch.bool))
            mask[_channels(member, gone)] = True
        count_heads(num_heads, model, part)
        if entry is not None:
            subject.graph._pruning_history.append(list(entry))

    made.prune = prune
    return made


def _side(member: Member) -> tuple[str, str, int | None]:
    return member.name, member.side, member.axis


def _shifted(group: NeuronGroup, removed: Gone) -> NeuronGroup:
    """A group at the places where its channels are after others were removed beside them."""
    members = []
    for member in group.members:
        mask = removed.get(_side(member))
        if mask is not None:
            places = (~mask).cumsum(0) - 1
            left = int((~mask).sum())
            member = replace(member, channels=places[member.channels], width=left)
        members.append(member)
    return replace(group, members=tuple(members))


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
