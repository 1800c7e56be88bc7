"""Remove all neurons outside a slice, and check the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nss_prune.core.models import Forward, call_model, evaluation, full_precision, training
from nss_prune.core.nested import tensors_in
from nss_prune.core.undo import undone_on_error
from nss_prune.errors import RemovalError
from nss_prune.graph.slices import Slice
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.check import (
    check_outputs,
    has_parameters,
    layers_used,
    masked_outputs,
    trains_any,
)
from nss_prune.surgery.execute import Pruners, execute
from nss_prune.surgery.metadata import apply_changes, planned_changes
from nss_prune.surgery.plan import plan_removal


@full_precision()
def remove(
    model: nn.Module,
    critical: Slice,
    example_inputs: Any,
    *,
    customized_pruners: Pruners | None = None,
    forward: Forward = call_model,
    adapters: Sequence[Adapter] = ADAPTERS,
) -> nn.Module:
    """Remove everything outside the slice, in place, and check the result.

    The smaller model must give what the masked one gave on the example inputs, or on a piece of
    them where the model takes smaller pictures; both are computed without TF32. If the model has
    layers that only training uses, it must also run in training mode. Training modes,
    requires_grad flags and hooks stay as they were; tensors that shrink are new ones, so build
    optimisers afterwards.

    Args:
        example_inputs: Inputs of a call of the model.
        customized_pruners: As torch-pruning takes them.
        forward: Function of (model, example_inputs) that gives the outputs.
        adapters: Those with which the neurons were found.

    Returns:
        ``model``.

    Raises:
        RemovalError: The smaller model would not run or would compute something else.
        ModelMismatchError: The slice is of another model.
    """
    steps = plan_removal(critical, model)
    changes = planned_changes(model, critical, adapters)
    with layers_used(model) as used, critical.masked(model):
        inputs, expected = masked_outputs(model, example_inputs, forward)
    resting = {layer for layer in model.modules() if has_parameters(layer)} - used
    trains = bool(resting) and trains_any(model, resting, example_inputs, forward)
    with undone_on_error(model):
        execute(model, steps, customized_pruners or {})
        apply_changes(changes)
        with evaluation(model), torch.no_grad():
            check_outputs(expected, tensors_in(_forward(model, inputs, forward)))
        if trains:
            with training(model), torch.no_grad():
                _forward(model, example_inputs, forward)
    return model


def _forward(model: nn.Module, example_inputs: Any, forward: Forward) -> Any:
    try:
        return forward(model, example_inputs)
    except Exception as error:
        raise RemovalError(
            f"the smaller model does not run: {error}; the model was put back. Name the layer in "
            "ignored_layers"
        ) from error
