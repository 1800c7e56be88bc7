"""The reference that the samples are compared with, where it is the mean of the data."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from nss_prune.core.batches import split_batch
from nss_prune.core.nested import add_nested, map_tensors, moved, tensors_in
from nss_prune.core.processes import gathered, processes
from nss_prune.errors import DataError


def mean_inputs(data: Iterable[Any]) -> Any:
    """The mean sample of the inputs, nested as they are.

    Raises:
        DataError: The data can be iterated only once, or its inputs have no mean.
    """
    if iter(data) is data:
        raise DataError(
            "baseline='mean' needs a pass of its own, but the data can be iterated only once; "
            "give a list or a DataLoader, or the mean as a tensor"
        )
    total: Any = None
    samples = 0
    for batch in data:
        inputs = split_batch(batch)[0]
        if not all(tensor.is_floating_point() for tensor in tensors_in(inputs)):
            raise DataError("baseline='mean' needs inputs of real numbers; give a tensor instead")
        summed = map_tensors(lambda tensor: tensor.sum(0, keepdim=True), inputs)
        total = summed if total is None else add_nested(total, summed)
        samples += len(tensors_in(inputs)[0])
    if processes() > 1:
        home = None if total is None else tensors_in(total)[0].device
        everywhere = gathered((moved(total, "cpu"), samples))
        samples = sum(count for _, count in everywhere)
        totals = [found for found, _ in everywhere if found is not None]
        total = functools.reduce(add_nested, totals) if totals else None
        total = total if home is None else moved(total, home)
    if total is None:
        raise DataError("the data has no batch; give an iterable of (inputs, labels) batches")
    return map_tensors(lambda tensor: tensor / samples, total)
