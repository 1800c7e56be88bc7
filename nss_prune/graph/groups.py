"""The dependency groups of a traced model -> neuron groups, or why one is left alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune.errors import GraphError, NothingToPruneError
from nss_prune.graph.axes import side_width
from nss_prune.graph.neurons import Member, NeuronGroup, NeuronMap, Side
from nss_prune.graph.sides import CROSSES_ATTENTION

GRAPH_OPERATIONS = frozenset(
    {
        tp.ops.OPTYPE.CONCAT,
        tp.ops.OPTYPE.SPLIT,
        tp.ops.OPTYPE.ELEMENTWISE,
        tp.ops.OPTYPE.RESHAPE,
        tp.ops.OPTYPE.UNBIND,
        tp.ops.OPTYPE.EXPAND,
        tp.ops.OPTYPE.SLICE,
        tp.ops.OPTYPE.OUTPUT,
    }
)

MAKES_THE_OUTPUT = "makes the model's output"
NOT_REACHED = (
    "autograd does not reach it in the example call: it is not called, or under no_grad or detach"
)
ONE_CHANNEL = "it makes a single channel"
NOT_SEEN = "torch-pruning does not see where its hidden units go"
IS_A_CELL = (
    "cells of recurrent layers are not followed from call to call; nn.LSTM, nn.GRU and nn.RNN are"
)
UNSUPPORTED = {
    tp.ops.OPTYPE.MHA: CROSSES_ATTENTION,
    tp.ops.OPTYPE.LSTM: "its channels cross nn.LSTM, of which torch-pruning ties the gates wrongly",
    tp.ops.OPTYPE.CUSTOMIZED: "a customized layer that makes or reads channels has unknown axes",
}


def find_neurons(
    model: nn.Module,
    graph: tp.DependencyGraph,
    output_nodes: set[Any],
    ignored: Sequence[nn.Module | nn.Parameter] = (),
    root_module_types: Sequence[type] = (nn.modules.conv._ConvNd, nn.Linear),
    apart: Collection[str] = (),
) -> NeuronMap:
    """Read the groups of a traced model.

    Args:
        ignored: Modules whose output channels must stay; their submodules count too.
        apart: Names of layers whose neurons are known, and no groups of channels.

    Raises:
        GraphError: torch-pruning fails on a group.
    """
    ignored_modules = {
        child for module in ignored if isinstance(module, nn.Module) for child in module.modules()
    }
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    groups: list[NeuronGroup] = []
    left_alone: dict[str, tuple[str, int]] = {}
    mates: dict[Any, str] = {}  # layers of a group that is left alone -> its root
    not_roots = ignored_modules | {model.get_submodule(name) for name in apart}
    for group in _all_groups(model, graph, root_module_types, not_roots):
        name = graph._module2name[group[0].dep.target.module]
        reason = reason_to_leave(graph, group, output_nodes, ignored_modules)
        members: tuple[Member, ...] = ()
        size, ties = len(group[0].idxs), _ties(group)
        if reason is None:
            members, reason = _members(graph, group, size // ties)
        if reason is None:
            groups.append(NeuronGroup(name, size // ties, members, ties))
        else:
            left_alone[name] = (reason, size)
            mates.update({dependency.target.module: name for dependency, _ in group})
    made = (member.name for group in groups for member in group.members if member.side != "in")
    known = {*left_alone, *made, *apart}
    for name, reason, size in _not_walked(model, graph, root_module_types, ignored_modules, mates):
        if name not in known:
            left_alone[name] = (reason, size)
    left_alone = dict(sorted(left_alone.items(), key=lambda item: order[item[0]]))
    return NeuronMap(
        groups=tuple(sorted(groups, key=lambda group: order[group.name])),
        left_alone={name: reason for name, (reason, _) in left_alone.items()},
        left_alone_sizes={name: size for name, (_, size) in left_alone.items()},
    )


def refuse_nothing(neurons: NeuronMap) -> NeuronMap:
    """The map itself.

    Raises:
        NothingToPruneError: It has no groups.
    """
    if not neurons.groups:
        raise NothingToPruneError(
            "no layer is left to prune: "
            + ("; ".join(f"{name}: {why}" for name, why in neurons.left_alone.items()) or "none")
            + ". Ignore fewer layers, or give a model with at least one hidden layer"
        )
    return neurons


def _all_groups(
    model: nn.Module,
    graph: tp.DependencyGraph,
    root_module_types: Sequence[type],
    ignored: set[nn.Module],
) -> list[Any]:
    try:
        return list(
            graph.get_all_groups(ignored_layers=list(ignored), root_module_types=root_module_types)
        )
    except Exception as error:
        raise GraphError(
            f"torch-pruning could not find the groups of {type(model).__name__}: "
            f"{type(error).__name__}: {error}; name the layer in ignored_layers"
        ) from error


def _not_walked(
    model: nn.Module,
    graph: tp.DependencyGraph,
    root_module_types: Sequence[type],
    ignored: set[nn.Module],
    mates: Mapping[Any, str],
) -> Iterator[tuple[str, str, int]]:
    """Layers that no group was looked for from: name, why, and output channels.

    Args:
        mates: Layer of a group that is left alone -> its root.
    """
    inside: set[nn.Module] = set()  # modules that are one operation for torch-pruning
    roots: tuple[type[nn.Module], ...] = (*root_module_types, nn.RNNCellBase)
    for name, module in model.named_modules():
        if module in graph.module2node:
            inside.update(part for part in module.modules() if part is not module)
        if module in inside or not isinstance(module, roots):
            continue
        if isinstance(module, nn.RNNCellBase):
            reason = IS_A_CELL
        elif module not in graph.module2node:
            reason = NOT_SEEN if isinstance(module, nn.RNNBase) else NOT_REACHED
        elif module in ignored:
            reason = "ignored"
        elif module in graph.IGNORED_LAYERS_IN_TRACING:
            continue
        elif module in mates:
            reason = f"goes with {mates[module]}, which is left alone"
        else:
            reason = "shares its channels with an ignored layer"
        yield name, reason, side_width(module, "out", None) or 0


def reason_to_leave(
    graph: tp.DependencyGraph, group: Any, output_nodes: set[Any], ignored: set[nn.Module]
) -> str | None:
    """Why a whole group must stay, or None."""
    makers = consumers = 0
    size, ties = len(group[0].idxs), _ties(group)
    if size < 2:
        return ONE_CHANNEL
    for dependency, channels in group:
        node, handler = dependency.target, dependency.handler
        makes = graph.is_out_channel_pruning_fn(handler)
        reads = graph.is_in_channel_pruning_fn(handler)
        makers += makes and not reads
        consumers += reads and not makes
        if node.module in ignored and makes:
            return "ignored"
        if makes and (node.grad_fn in output_nodes or node.type == tp.ops.OPTYPE.OUTPUT):
            return MAKES_THE_OUTPUT
        passes_on = makes and reads and node.type != tp.ops.OPTYPE.MHA
        if node.type in UNSUPPORTED and not passes_on:
            return UNSUPPORTED[node.type]
        groups = _channel_groups(node.module, node.type)
        if groups > 1 and (size % ties or not _can_be_tied(node.module, channels, size)):
            return f"{graph._module2name.get(node.module)} ties channels in {groups} groups"
    if not makers:
        return "made outside of what is traced"
    return None if consumers else "nothing reads it"


def _channel_groups(module: Any, kind: Any) -> int:
    """Channel groups whose sizes must stay equal; 1 where channels are independent."""
    if kind == tp.ops.OPTYPE.CONV:
        return int(module.groups)
    if kind == tp.ops.OPTYPE.DEPTHWISE_CONV:
        return 1 if module.groups == module.in_channels else int(module.groups)
    if kind == tp.ops.OPTYPE.GN:
        return int(module.num_groups)
    return 1


def _ties(group: Any) -> int:
    """Channels that must go together so that all channel groups stay of equal size."""
    return math.lcm(*(_channel_groups(dep.target.module, dep.target.type) for dep, _ in group))


def _can_be_tied(module: Any, channels: Sequence[int], size: int) -> bool:
    """Whether a layer with channel groups sees all channels of the root, in their order."""
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels:
        return False  # several channels from each that is read
    return list(channels) == list(range(size))


def _members(
    graph: tp.DependencyGraph, group: Any, neurons_in_group: int
) -> tuple[tuple[Member, ...], str | None]:
    """Members of a group, or the inconsistency that forbids to use it."""
    size = len(group[0].idxs)
    if list(group[0].idxs) != list(range(size)):
        return (), "its root does not hold all of its channels"
    members = []
    for item in group:
        node = item.dep.target
        if node.type in GRAPH_OPERATIONS:
            continue
        name = _name(graph, node)
        width = _width(graph, node, _side(graph, item.dep))
        if width is None:  # a PReLU with a single weight serves any number of channels
            continue
        if len(item.idxs) != len(item.root_idxs) or None in item.root_idxs:
            return (), f"{name} cannot be mapped back to the root"
        channels = torch.tensor(item.idxs, dtype=torch.long)
        neurons = torch.tensor(item.root_idxs, dtype=torch.long)
        tied_here = _channel_groups(node.module, node.type) > 1
        if tied_here and not torch.equal(neurons, channels):
            return (), f"{name} ties channels that come in another order"
        if len(channels.unique()) != len(channels) or _outside(channels, width):
            return (), f"{name} has {width} channels but is asked for others"
        if _outside(neurons, size):
            return (), f"{name} maps to neurons that the root does not have"
        members.append(_member(graph, item.dep, name, channels, neurons % neurons_in_group, width))
    return tuple(members), None


def _outside(positions: Tensor, size: int) -> bool:
    """Whether some positions are not among 0 .. size - 1."""
    return bool(len(positions)) and not 0 <= int(positions.min()) <= int(positions.max()) < size


def _name(graph: tp.DependencyGraph, node: Any) -> str:
    if node.type == tp.ops.OPTYPE.PARAMETER:
        return str(graph._param_to_name[node.module])
    return str(graph._module2name[node.module])


def _width(graph: tp.DependencyGraph, node: Any, side: Side) -> int | None:
    """Channels of a node; those of a customized layer by the caller's functions."""
    if node.type != tp.ops.OPTYPE.CUSTOMIZED:
        return side_width(node.module, side, node.pruning_dim)
    width = graph.get_pruner_of_module(node.module).get_out_channels(node.module)
    return None if width is None else int(width)


def _side(graph: tp.DependencyGraph, dependency: Any) -> Side:
    makes = graph.is_out_channel_pruning_fn(dependency.handler)
    reads = graph.is_in_channel_pruning_fn(dependency.handler)
    return "both" if makes and reads else "out" if makes else "in"


def _member(
    graph: tp.DependencyGraph,
    dependency: Any,
    name: str,
    channels: Tensor,
    neurons: Tensor,
    width: int,
) -> Member:
    is_parameter = dependency.target.type == tp.ops.OPTYPE.PARAMETER
    order = (neurons * width + channels).argsort()
    return Member(
        name=name,
        side=_side(graph, dependency),
        channels=channels[order],
        neurons=neurons[order],
        width=width,
        axis=dependency.target.pruning_dim if is_parameter else None,
    )
