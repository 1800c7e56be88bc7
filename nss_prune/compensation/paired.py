"""What a consumer sees in the whole model and in the sliced one, of the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from nss_prune.core.batches import counted_batches
from nss_prune.core.models import Forward, device_of, submodule
from nss_prune.core.processes import gathered
from nss_prune.graph.neurons import Member
from nss_prune.graph.slices import Slice
from nss_prune.statistics.capture import by_sample, readings
from nss_prune.statistics.consumers import summed_positions
from nss_prune.statistics.moments import (
    ConsumerStatistics,
    Moments,
    add_moments_over_processes,
)
from nss_prune.statistics.survey import Survey


def paired_statistics(
    model: nn.Module,
    sliced: nn.Module,
    critical: Slice,
    name: str,
    data: Iterable[Any],
    shown: Survey,
    sides: Sequence[Member],
    forward: Forward,
) -> ConsumerStatistics:
    """Of ``[2 channels]``: what a consumer sees in the whole model, then in the sliced one.

    It takes a pass over the data, in which both models run up to the consumer.

    Args:
        sliced: A copy of the model, in which the slice is masked meanwhile.
        name: Of the consumer.
        shown: The survey of the whole model.
        sides: Of the consumer, by :func:`nss_prune.graph.axes.sides_by_consumer`.
        forward: Calls a model on the inputs of a batch.

    Raises:
        DataError, NumericalError: The data cannot be used.
    """
    module = submodule(model, name)
    moments = Moments(2 * sides[0].width, summed_positions(module, sides), device=device_of(model))
    shape: tuple[int, ...] = ()
    for number, inputs, samples in counted_batches(model, data, False, ""):
        wholes = readings(model, name, inputs, number, shown.calls[name], sides, forward)
        with critical.masked(sliced):
            slices = readings(sliced, name, inputs, number, shown.calls[name], sides, forward)
        for whole, part in zip(wholes, slices, strict=True):
            values = [by_sample(name, read, module, samples) for read in (whole, part)]
            moments.add(torch.cat(values, dim=1))
            shape = tuple(whole.shape[1:])
    add_moments_over_processes([moments])
    shape = next((found for found in gathered(shape) if found), ())
    return moments.statistics(name, shape, shown.norms.get(name))
