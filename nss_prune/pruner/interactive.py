"""torch-pruning's view of a slice: groups to prune one by one, and the history of a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nss_prune.graph.slices import Slice
from nss_prune.pruner.subject import Subject

Entry = tuple[str, bool, list[int]]
"""Root layer, whether output channels go, and which: as in torch-pruning's history."""


def entries(chosen: Slice) -> Iterator[Entry]:
    """What a slice removes, for ``load_pruning_history``, heads by the layer that consumes them."""
    groups = {group.name: group for group in chosen.groups}
    for name, neurons in chosen.removed.items():
        group = groups[name]
        if group.has_channels:
            tied = [neurons + group.size * tie for tie in range(group.ties)]
            yield name, True, torch.cat(tied).tolist()
            continue
        gone = ~chosen.kept[name]
        for consumer in group.readers[:1]:
            yield consumer.name, False, consumer.channels[gone[consumer.neurons]].tolist()


def count_heads(num_heads: dict[nn.Module, int], model: nn.Module, chosen: Slice) -> None:
    """Write to a pruner's ``num_heads`` how many a slice keeps.

    Scripts set the attributes of attention from this.
    """
    for group in chosen.groups:
        if not group.has_channels:
            num_heads[model.get_submodule(group.name)] = int(chosen.kept[group.name].sum())


def pruning_groups(subject: Subject, chosen: Slice) -> Iterator[Any]:
    """torch-pruning's groups, each with the channels to remove; heads are left out."""
    channels = {group.name for group in subject.groups if group.has_channels}
    for name, outputs, positions in entries(chosen):
        if name not in channels or not outputs:  # torch-pruning would take heads apart
            continue
        module = subject.model.get_submodule(name)
        function = subject.graph.get_pruner_of_module(module).prune_out_channels
        yield subject.graph.get_pruning_group(module, function, positions)
