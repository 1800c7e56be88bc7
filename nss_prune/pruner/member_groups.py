"""torch-pruning's groups made of the members of ours, where it cannot follow the model."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor

from nss_prune.errors import GraphError
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.pruner.subject import Subject


def group_of_members(subject: Subject, group: NeuronGroup, gone: Tensor | None = None) -> Any:
    """A torch-pruning group of the layers of a group; the layer it is named after comes first.

    What a member has of a neuron is related to what the first layer has of it, channel by channel
    in their order, and again from the start where it has more. Parameters without a layer are left
    out.

    Args:
        gone: True for the neurons that are meant, ``[neurons]``; all by default.

    Raises:
        GraphError: Some are meant, and parameters without a layer would have to go as well.
    """
    members = [member for member in group.members if member.axis is None]
    if gone is not None and len(members) < len(group.members):
        raise GraphError(
            f"torch-pruning cannot prune the heads of {group.name}; call step() without "
            "interactive=True, or name the layer in ignored_layers"
        )
    meant = torch.ones(group.size, dtype=torch.bool) if gone is None else gone
    members.sort(key=lambda member: (member.name, member.side) != (group.name, "out"))
    root = _by_neuron(members[0], group.size)
    made = tp.dependency.Group()
    made._DG = subject.graph
    for member in members:
        channels, roots = [], []
        for neuron in meant.nonzero().flatten().tolist():
            own = _by_neuron(member, group.size)[neuron]
            channels += own
            roots += [root[neuron][i % len(root[neuron])] for i in range(len(own))]
        made.add_dep(dependency_of(subject, member), channels)
        made[-1].root_idxs = roots
    return made


def _by_neuron(member: Member, size: int) -> list[list[int]]:
    """The channels of each neuron."""
    found: list[list[int]] = [[] for _ in range(size)]
    for channel, neuron in zip(member.channels.tolist(), member.neurons.tolist(), strict=True):
        found[neuron].append(channel)
    return found


def dependency_of(subject: Subject, member: Member) -> Any:
    """That a layer is pruned."""
    graph = subject.graph
    layer = subject.model.get_submodule(member.name)
    functions = graph.get_pruner_of_module(layer)
    reads = member.side == "in"
    function = functions.prune_in_channels if reads else functions.prune_out_channels
    node = graph.module2node[layer]
    return tp.dependency.Dependency(trigger=function, handler=function, source=node, target=node)
