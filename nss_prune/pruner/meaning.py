"""What the outputs of a subject mean, for the passes over its data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from nss_prune.core.batches import first_batch
from nss_prune.core.models import evaluation
from nss_prune.core.nested import tensors_in
from nss_prune.core.outputs import Outputs, OutputsSpec, outputs_of
from nss_prune.pruner.subject import Subject


def outputs_for(
    subject: Subject, data: Iterable[Any], spec: OutputsSpec = None
) -> tuple[Outputs, Iterable[Any]]:
    """What the outputs mean, and the data with all of its batches.

    Args:
        spec: A user's; None for what the data's outputs and labels decide. Then a user's
            ``output_transform`` narrows the outputs, where it keeps the samples apart.

    Raises:
        ArgumentError, DataError: See :func:`nss_prune.core.outputs.outputs_of`.
    """
    first, data = first_batch(data)
    shown = [first] if isinstance(data, Iterator) else data
    spec = _narrowing(subject) if spec is None else spec
    return outputs_of(subject.model, shown, spec, forward=subject.forward), data


def _narrowing(subject: Subject) -> Callable[[Any], Any] | None:
    """The user's ``output_transform``; None where it does not give a row for each sample."""
    arguments = {} if subject.tracer is None else subject.tracer.graph_arguments
    transform: Callable[[Any], Any] | None = arguments.get("output_transform")
    if transform is None:
        return None
    with evaluation(subject.model), torch.no_grad():
        kept = tensors_in(transform(subject.forward(subject.model, subject.example_inputs)))
    samples = len(tensors_in(subject.example_inputs)[0])
    by_sample = all(tensor.dim() and len(tensor) == samples for tensor in kept)
    return transform if kept and by_sample else None
