"""The neurons of a model, traced whole if that works and in parts if not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nss_prune.core.models import Forward, call_model
from nss_prune.discovery.completed import completed
from nss_prune.discovery.parts import discover_parts
from nss_prune.discovery.trial import verdicts_of
from nss_prune.errors import GraphError
from nss_prune.graph.deadline import within
from nss_prune.graph.groups import find_neurons
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.tracing import as_traced, trace, traceable
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter

TIMEOUT = 60.0
"""Seconds of CPU time for torch-pruning to follow a model, unless ``timeout`` says otherwise."""

WHOLE_SHARE = 1 / 3  # of the time: for the model as a whole, the rest for its parts


def discover(
    model: nn.Module,
    example_inputs: Any,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
    *,
    timeout: float = TIMEOUT,
    forward: Forward = call_model,
    adapters: Sequence[Adapter] = ADAPTERS,
) -> NeuronMap:
    """The neurons of a model; it is left as found.

    Args:
        example_inputs: Inputs of one call.
        ignored: Modules whose output channels must stay.
        timeout: Seconds of CPU time for the whole model and its parts together.
        forward: Function of (model, example_inputs) that gives the outputs.
        adapters: The structures in which neurons are more than channels.

    Raises:
        ArgumentError: Weights are masked or parametrized.
        GraphError: The model does not run, or no part of it can be traced.
        NothingToPruneError: No group is left.
    """
    reason: GraphError | None = None
    with traceable(model):
        called = as_traced(forward, example_inputs)
        verdicts = verdicts_of(model, adapters, ignored, *called)
    graph: Any = None
    try:
        graph, output_nodes = within(
            WHOLE_SHARE * timeout, model, lambda: _traced(model, example_inputs, forward)
        )
        found = within(
            WHOLE_SHARE * timeout,
            model,
            lambda: find_neurons(model, graph, output_nodes, ignored, apart=verdicts.makers),
        )
    except GraphError as error:
        graph, reason, rest = None, error, (1 - WHOLE_SHARE) * timeout
        found = discover_parts(model, example_inputs, ignored, error, timeout=rest, forward=forward)
    return completed(
        model,
        found,
        verdicts,
        example_inputs,
        ignored=ignored,
        forward=forward,
        graph=graph,
        untraceable=reason,
    )


def _traced(model: nn.Module, example_inputs: Any, forward: Forward) -> tuple[Any, set[Any]]:
    called = None if forward is call_model else forward
    return trace(model, example_inputs, forward_fn=called)
