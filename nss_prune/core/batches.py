"""A batch -> inputs, labels and the number of samples: moved and checked where it enters."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import device_of
from nss_prune.core.nested import map_tensors, moved, tensors_in
from nss_prune.core.processes import gathered, given_by, processes
from nss_prune.core.progress import shown as shown
from nss_prune.core.shards import without_padding
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
    for number, batch in enumerate(shown(without_padding(data), progress, label)):
        yield number, *entered(model, batch, number)
    if number < 0 and processes() == 1:  # the first batch of all processes is checked elsewhere
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
    home = device_of(model)
    try:
        inputs, labels = moved(split_batch(batch), home)
    except (NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"batch {number} cannot be moved to {home}, where the model is: {error}"
        ) from error
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


def first_batch(
    data: Iterable[Any], device: torch.device | str | None = None
) -> tuple[Any, Iterable[Any]]:
    """The first batch, and data that still has it.

    In several processes it is that of the first which has one; some may have none.

    Args:
        device: Where the batch of another process goes; its own by default.

    Raises:
        DataError: There is none.
    """
    data = without_padding(data)
    batches = iter(data)
    own = first = next(batches, None)
    if processes() > 1:
        first = _shared(own, device)
    if first is None:
        raise DataError("the data has no batch; give an iterable of (inputs, labels) batches")
    if own is None or batches is not data:
        return first, data
    return first, itertools.chain([own], batches)


def shared_data(data: Iterable[Any]) -> Iterable[Any]:
    """The data of a pass in which every process reads its own, and some may have none.

    Raises:
        DataError: None of several processes has a batch.
    """
    return data if processes() == 1 else first_batch(data)[1]


def length(data: Iterable[Any]) -> int | None:
    """Number of batches, where that is known beforehand."""
    try:
        return len(data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def has_samples(data: Iterable[Any], wanted: int) -> bool:
    """Whether the data of all processes has so many; no more of it is read than that takes."""
    seen = 0
    for batch in data:
        tensors = tensors_in(split_batch(batch)[0])
        seen += len(tensors[0]) if tensors else 0
        if seen >= wanted:
            break
    return sum(gathered(seen)) >= wanted


def _shared(batch: Any, device: torch.device | str | None) -> Any:
    """The batch of the first process that has one; None where none has."""
    present = gathered(batch is not None)
    if not any(present):
        return None
    sent = given_by(present.index(True), moved(batch, "cpu"))
    if device is None:
        device = next((tensor.device for tensor in tensors_in(batch)), torch.device("cpu"))
    return moved(sent, device)
