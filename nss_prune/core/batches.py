"""A batch -> inputs, labels and the number of samples: moved and checked where it enters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nss_prune.core.models import device_of
from nss_prune.core.nested import map_tensors, moved, tensors_in
from nss_prune.errors import DataError


def counted_batches(
    model: nn.Module, data: Iterable[Any], progress: bool | None, label: str
) -> Iterator[tuple[int, Any, int]]:
    """(number, inputs, samples) of every batch.

    Raises:
        DataError: There is none, or it cannot be used.
    """
    for number, inputs, _, samples in labelled_batches(model, data, progress, label):
        yield number, inputs, samples


def labelled_batches(
    model: nn.Module, data: Iterable[Any], progress: bool | None, label: str
) -> Iterator[tuple[int, Any, Any, int]]:
    """(number, inputs, labels, samples) of every batch; labels are None where there are none.

    Raises:
        DataError: There is none, or it cannot be used.
    """
    number = -1
    hidden = None if progress is None else not progress
    for number, batch in enumerate(
        tqdm(data, desc=label, unit="batch", leave=False, disable=hidden)
    ):
        yield number, *entered(model, batch, number)
    if number < 0:
        raise DataError("the data has no batches; give at least one batch of (inputs, labels)")


def as_computed(values: Tensor) -> Tensor:
    """At least float32: half precision would lose the sums."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and labels of a batch; labels are None for a bare tensor or dict.

    Raises:
        DataError: It is neither.
    """
    if isinstance(batch, (Tensor, Mapping)):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        return batch[0], None
    items = f" of {len(batch)} items" if isinstance(batch, (tuple, list)) else ""
    raise DataError(
        f"a batch is a {type(batch).__name__}{items}; give (inputs, labels), with several inputs "
        "as a tuple or dict in the first place"
    )


def entered(model: nn.Module, batch: Any, number: int) -> tuple[Any, Any, int]:
    """Inputs and labels of a batch on the model's device, and the number of samples.

    Args:
        number: Of the batch, for messages.

    Raises:
        DataError: The batch cannot be used.
    """
    inputs, labels = moved(split_batch(batch), device_of(model))
    return inputs, labels, samples_in(inputs, number)


def pick_samples(value: Any, indices: Tensor) -> Any:
    """The same nest with only some samples of every tensor."""
    return map_tensors(lambda tensor: tensor[indices.to(tensor.device)], value)


def samples_in(inputs: Any, number: int) -> int:
    """Number of samples of a batch.

    Raises:
        DataError: No samples.
    """
    tensors = tensors_in(inputs)
    if not tensors or any(tensor.dim() == 0 for tensor in tensors):
        raise DataError(
            f"batch {number} holds no input tensors; give (inputs, labels) with the samples "
            "along the first axis"
        )
    if tensors[0].shape[0] == 0:
        raise DataError(f"batch {number} has no samples; leave empty batches out")
    return int(tensors[0].shape[0])


def has_samples(data: Iterable[Any], least: int) -> bool:
    """Whether there are at least so many samples."""
    batches = (tensors_in(split_batch(batch)[0]) for batch in data)
    samples = itertools.accumulate(len(tensors[0]) if tensors else 0 for tensors in batches)
    return any(seen >= least for seen in samples)


def first_batch(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and data that still has it.

    Raises:
        DataError: There is none.
    """
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise DataError("the data has no batch; give an iterable of (inputs, labels) batches")
    return first, itertools.chain([first], batches) if batches is data else data
