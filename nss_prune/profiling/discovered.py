"""The neurons of a model that can be profiled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nss_prune.core.batches import entered, first_batch
from nss_prune.core.models import Forward
from nss_prune.core.processes import refuse_sharded
from nss_prune.core.thread_state import outside_inference_mode
from nss_prune.core.undo import left_as_found
from nss_prune.discovery.samples import readable
from nss_prune.discovery.whole import discover
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.tracing import resolve_layers
from nss_prune.structures.protocol import Adapter


def with_example(
    model: nn.Module, data: Iterable[Any], example_inputs: Any
) -> tuple[Any, Iterable[Any]]:
    """Inputs to trace the model with, by default the first batch's, and all of the data."""
    if example_inputs is not None:
        return example_inputs, data
    first, data = first_batch(data)
    return entered(model, first, 0)[0], data


@outside_inference_mode
def readable_neurons(
    model: nn.Module,
    example_inputs: Any,
    ignored_layers: Iterable[nn.Module | nn.Parameter | type | str],
    forward: Forward,
    adapters: Sequence[Adapter],
) -> NeuronMap:
    """The neurons outside of ignored layers whose activations can be told apart by sample.

    Raises:
        ArgumentError: The weights are sharded over devices.
        GraphError, NothingToPruneError: From tracing the model.
    """
    refuse_sharded(model)
    ignored = resolve_layers(model, ignored_layers)
    with left_as_found(model):
        neurons = discover(model, example_inputs, ignored, forward=forward, adapters=adapters)
        return readable(model, neurons, example_inputs, forward)
