"""The traced neurons, completed by those that torch-pruning describes wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from nss_prune.core.models import Forward, call_model
from nss_prune.discovery.calls import Call
from nss_prune.discovery.claims import Claim
from nss_prune.discovery.coupled import coupled_on_trial
from nss_prune.discovery.trial import adapted_on_trial
from nss_prune.errors import GraphError
from nss_prune.graph.groups import refuse_nothing
from nss_prune.graph.neurons import NeuronMap
from nss_prune.surgery.execute import Pruners


def completed(
    model: nn.Module,
    found: NeuronMap,
    claimed: Sequence[Claim],
    calls: Mapping[nn.Module, Call],
    example_inputs: Any,
    *,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
    forward: Forward = call_model,
    customized_pruners: Pruners | None = None,
    untraceable: GraphError | None = None,
) -> NeuronMap:
    """The map with channels that go together in blocks, then with what the adapters claim.

    Args:
        claimed, calls: As :func:`nss_prune.discovery.trial.adapted_on_trial` takes them.
        untraceable: Why the model was traced in parts.

    Raises:
        GraphError: ``untraceable``, where no neurons are left.
        NothingToPruneError: No neurons are left of a model that was traced as a whole.
    """
    found = coupled_on_trial(
        model,
        found,
        example_inputs,
        ignored=ignored,
        forward=forward,
        customized_pruners=customized_pruners,
    )
    found = adapted_on_trial(model, found, claimed, calls)
    if untraceable is not None and not found.groups:
        raise untraceable
    return refuse_nothing(found)
