"""torch-pruning's criteria, asked of neurons that torch-pruning does not describe itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.dependency import Dependency
from torch_pruning.dependency.node import Node

from nss_prune.graph.neurons import Member, NeuronGroup


def of_followed(
    model: nn.Module, group: NeuronGroup, importance: Callable[[Any], Any]
) -> Tensor | None:
    """What a criterion says of the neurons of a group, ``[neurons]``, or None.

    It is asked of a torch-pruning group of the same layers and channels, those of each neuron under
    its number, which gives a neuron the sum over its channels.
    """
    layers = [member for member in group.members if member.axis is None]
    root = next(member for member in layers if member.name == group.name)
    asked = tp.dependency.Group()
    for member in (root, *(member for member in layers if member is not root)):
        dependency = _dependency(model, member)
        if dependency is not None:
            asked.add_dep(dependency, member.channels.tolist())
            asked[-1].root_idxs = member.neurons.tolist()
    if not len(asked):
        return None
    found = importance(asked)
    if found is None or len(found) < group.size:
        return None
    scores: Tensor = found.detach().cpu()
    return scores[: group.size] * (group.size / len(scores))


def _dependency(model: nn.Module, member: Member) -> Any:
    """The end of an edge of torch-pruning's graph; None where it has no function for a layer."""
    module = model.get_submodule(member.name)
    pruner = tp.pruner.function.PrunerBox.get(tp.ops.module2type(module))
    if pruner is None or isinstance(module, nn.RNNBase):
        return None
    node = Node(module, None, member.name)
    name = "prune_in_channels" if member.side == "in" else "prune_out_channels"
    function = getattr(pruner, name)
    return Dependency(trigger=function, handler=function, source=node, target=node)
