"""The traced neurons, completed by those that torch-pruning describes wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nss_prune.core.models import Forward, call_model
from nss_prune.discovery.coupled import coupled_on_trial, is_complete
from nss_prune.discovery.trial import Verdicts, with_verdicts
from nss_prune.errors import GraphError
from nss_prune.graph.groups import refuse_nothing
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.regular import keeps_channels_whole, maps_rightly
from nss_prune.surgery.execute import Pruners


def completed(
    model: nn.Module,
    found: NeuronMap,
    verdicts: Verdicts,
    example_inputs: Any,
    *,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
    forward: Forward = call_model,
    customized_pruners: Pruners | None = None,
    graph: Any = None,
    untraceable: GraphError | None = None,
) -> NeuronMap:
    """The map with channels that go together in blocks, then with what the adapters claim.

    Args:
        verdicts: What became of the adapters' claims.
        ignored: Layers and parameters whose channels must stay.
        graph: torch-pruning's; channels that it keeps whole are not followed again.
        untraceable: Why the model was traced in parts.

    Raises:
        GraphError: ``untraceable``, where no neurons are left.
        NothingToPruneError: No neurons are left of a model that was traced as a whole.
    """
    if graph is None or not is_complete(found) or not keeps_channels_whole(graph):
        found = coupled_on_trial(
            model,
            found,
            example_inputs,
            ignored=[*ignored, *(model.get_submodule(name) for name in verdicts.makers)],
            forward=forward,
            customized_pruners=customized_pruners,
        )
    found = _marked(model, with_verdicts(model, found, verdicts), graph)
    if untraceable is not None and not found.groups:
        raise untraceable
    return refuse_nothing(found)


def _marked(model: nn.Module, neurons: NeuronMap, graph: Any) -> NeuronMap:
    """The map, in which halves that torch-pruning maps wrongly are marked as followed."""
    if graph is None:
        return neurons
    groups = []
    for group in neurons.groups:
        halves = group.has_channels and group.ties > 1 and not group.followed
        if halves:
            layer, width = model.get_submodule(group.name), group.size * group.ties
            known = layer in graph.module2node
            group = replace(group, followed=known and not maps_rightly(graph, layer, width))
        groups.append(group)
    return replace(neurons, groups=tuple(groups))
