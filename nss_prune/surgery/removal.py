"""Remove all neurons outside a slice, and check the result."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nss_prune.core.models import (
    Forward,
    call_model,
    evaluation,
    full_precision,
    training,
    uncompiled,
)
from nss_prune.core.undo import undone_on_error
from nss_prune.errors import RemovalError
from nss_prune.graph.slices import Slice
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.cut import Pruners, cut
from nss_prune.surgery.pictures import smaller
from nss_prune.surgery.plan import plan_removal
from nss_prune.surgery.structure import StructureCheck
from nss_prune.surgery.usage import layers_used, resting, trains_any


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

    First the removal is tried on a copy with random weights and random inputs, where the smaller
    model must give what the masked one gives (see :class:`nss_prune.surgery.structure
    .StructureCheck`). Then the smaller model must run on the example inputs, and, if it has layers
    that only training uses, in training mode as well. Training modes, requires_grad flags and hooks
    stay as they were; tensors that shrink are new ones, so build optimisers afterwards.

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
    given, model = model, uncompiled(model)
    steps = plan_removal(critical, model)
    structure = StructureCheck(model, example_inputs, forward)
    widths = structure.check(critical, customized_pruners, adapters)
    inputs, used = structure.inputs, structure.used
    if inputs is None:  # no layer consumes what goes
        with layers_used(model) as used:
            inputs = _runnable(model, example_inputs, forward)
    layers = resting(model, used)
    trains = bool(layers) and trains_any(model, layers, example_inputs, forward)
    with undone_on_error(model):
        cut(model, critical, steps, adapters, structure.buffers, customized_pruners, widths=widths)
        with evaluation(model), torch.no_grad():
            _run(model, inputs, forward)
        if trains:
            with training(model), torch.no_grad():
                _run(model, example_inputs, forward)
    return given


def _runnable(model: nn.Module, example_inputs: Any, forward: Forward) -> Any:
    """Inputs that the model takes, small pictures if it can."""
    with evaluation(model), torch.no_grad():
        small = smaller(example_inputs)
        if small is not None:
            with contextlib.suppress(Exception):
                forward(model, small)
                return small
        try:
            forward(model, example_inputs)
        except Exception as error:
            raise RemovalError(f"the model does not run on the example inputs: {error}") from error
    return example_inputs


def _run(model: nn.Module, inputs: Any, forward: Forward) -> None:
    try:
        forward(model, inputs)
    except Exception as error:
        raise RemovalError(
            f"the smaller model does not run: {error}; the model was put back. Name the layer in "
            "ignored_layers"
        ) from error
