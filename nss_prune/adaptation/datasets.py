"""Batches of (inputs, labels): checked, moved, divided, and mixed with replayed ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, Subset

from nss_prune.core.batches import first_batch, pick_samples, split_batch
from nss_prune.core.models import device_of
from nss_prune.core.nested import map_tensors, moved, tensors_in
from nss_prune.core.processes import agreed, gathered
from nss_prune.core.shards import without_padding
from nss_prune.errors import DataError
from nss_prune.profiling.streaming import labelled_draw

Data = Iterable[Any]
"""Batches of (inputs, labels), on any device."""

Checked = Callable[[Any, int], tuple[Any, Tensor]]
"""Function of a batch and its number that gives inputs and labels, or raises DataError."""


def repeatable(data: Data) -> Data:
    """``data`` itself.

    Raises:
        DataError: It can be iterated only once.
    """
    if isinstance(data, Iterator):
        raise DataError(
            "the data can be iterated only once, but is needed for every epoch and once more "
            "afterwards; give a list of batches or a DataLoader"
        )
    return data


def with_labels(batch: Any, number: int) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch.

    Args:
        number: Of the batch, for messages.

    Raises:
        DataError: There are no labels, or not as numbers.
    """
    inputs, labels = split_batch(batch)
    if labels is None:
        raise DataError(f"batch {number} has no labels; give (inputs, labels)")
    try:
        return inputs, torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the labels of batch {number} are no tensor: {error}") from error


def with_classes(batch: Any, number: int) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch, one class index for each sample, int64 ``[samples]``.

    Args:
        number: Of the batch, for messages.

    Raises:
        DataError: The labels are none of that kind.
    """
    inputs, labels = with_labels(batch, number)
    samples = [tensor.shape[:1] for tensor in tensors_in(inputs)[:1]]
    if labels.is_floating_point() or samples != [labels.shape]:
        raise DataError(
            f"batch {number} has labels {labels.dtype} {tuple(labels.shape)} for inputs "
            f"{[tuple(tensor.shape) for tensor in tensors_in(inputs)]}; give one class index for "
            "each sample"
        )
    return inputs, labels.long()


@agreed()
def classes_in(data: Data) -> tuple[int, ...]:
    """All labels that occur in any process, ascending.

    Raises:
        DataError: There are none, or they are no class indices.
    """
    found = set().union(*gathered(_own_classes(data)))
    if not found:
        raise DataError("the data has no batch; give an iterable of (inputs, labels) batches")
    return tuple(sorted(found))


def _own_classes(data: Data) -> set[int]:
    """The labels of this process."""
    drawn = labelled_draw(data, 0) if isinstance(data, DataLoader) else None
    if drawn:
        return {label for label, _ in drawn}
    found: set[int] = set()
    for number, batch in enumerate(data):
        found.update(with_classes(batch, number)[1].unique().tolist())
    return found


class Moved:
    """(inputs, labels) on a device, as often as asked.

    Args:
        data: Batches on any device.
        device: Where they are wanted.
        checked: Divides a batch.
    """

    def __init__(
        self,
        data: Data,
        device: torch.device,
        checked: Checked = with_labels,
    ) -> None:
        self.data = data
        self.device = device
        self.checked = checked

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for number, batch in enumerate(self.data):
            inputs, labels = self.checked(batch, number)
            yield moved((inputs, labels), self.device)

    @agreed()
    def first_inputs(self) -> Any:
        """The inputs of the first batch of the first process that has one.

        Raises:
            DataError: There is no batch, or it cannot be used.
        """
        return first_batch(self, self.device)[0][0]


def on_device_of(model: nn.Module, data: Data, checked: Checked = with_classes) -> Moved:
    """(inputs, labels) on the device of a model; by default labels have to be class indices."""
    return Moved(data, device_of(model), checked)


def placed(model: nn.Module, data: Data) -> Data:
    """Batches on the device of a model; a DataLoader on a CPU as it is.

    That can be profiled in the order of its categories.
    """
    return data if device_of(model).type == "cpu" else on_device_of(model, data)


class Shuffled:
    """Batches in another order at each pass."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for position in torch.randperm(len(self.batches)).tolist():
            yield self.batches[position]


class Chained:
    """Several data sets one after the other, as often as asked."""

    def __init__(self, parts: Sequence[Data]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.parts)


class Drawn:
    """A random share of the samples of every batch, the same in each pass, or all others."""

    def __init__(self, data: Data, share: float, seed: int, *, others: bool) -> None:
        self.data = data
        self.share = share
        self.seed = seed
        self.others = others

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for number, batch in enumerate(self.data):
            inputs, labels = with_classes(batch, number)
            drawn = torch.rand(len(labels), generator=generator) < self.share
            indices = (drawn != self.others).nonzero().flatten()
            if len(indices):
                yield pick_samples(inputs, indices), pick_samples(labels, indices)


def parts(data: Data, share: float, seed: int) -> tuple[Data, Data]:
    """A random share of the samples and the others, both to be iterated repeatedly.

    In several processes, of those of each; what a DistributedSampler repeats counts once.

    Of a DataLoader over a map-style data set, samples are drawn once and for all. Of other data
    they are drawn by their position, so that it must come in the same order in every pass.
    """
    data = without_padding(data)
    if (
        not isinstance(data, DataLoader)
        or isinstance(data.dataset, IterableDataset)
        or data.batch_sampler is None
    ):
        return (
            Drawn(data, share, seed, others=False),
            Drawn(data, share, seed, others=True),
        )
    batches = [list(batch) for batch in data.batch_sampler]
    size = max(map(len, batches), default=1)
    indices = sorted(set(itertools.chain.from_iterable(batches)))
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [indices[position] for position in order]
    count = max(1, round(share * len(shuffled)))
    first, second = Subset(data.dataset, shuffled[:count]), Subset(data.dataset, shuffled[count:])
    return _loader(data, first, max(1, round(share * size))), _loader(data, second, size)


def _loader(like: DataLoader[Any], dataset: Dataset[Any], size: int) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=size, **_loading(like))


def sampled(like: DataLoader[Any], sampler: Sampler[Any]) -> DataLoader[Any]:
    """A loader over the same data set with another sampler, of samples or of batches."""
    if isinstance(sampler, BatchSampler):
        return DataLoader(like.dataset, batch_sampler=sampler, **_loading(like))
    return DataLoader(like.dataset, batch_size=like.batch_size, sampler=sampler, **_loading(like))


def _loading(loader: DataLoader[Any]) -> dict[str, Any]:
    return {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "worker_init_fn": loader.worker_init_fn,
    }


def mixed(data: Data, replayed: Data | None) -> Iterator[tuple[Any, Tensor, int]]:
    """(inputs, labels, number of own samples): each batch with a replayed one behind it.

    Raises:
        DataError: There is nothing to replay.
    """
    again = None if replayed is None else endless(replayed)
    for inputs, labels in data:
        if again is None:
            yield inputs, labels, len(labels)
            continue
        more, their_labels = next(again)
        yield joined_inputs(inputs, more), torch.cat([labels, their_labels]), len(labels)


def joined_inputs(first: Any, second: Any) -> Any:
    """The samples of two nests of tensors of the same structure, one behind the other."""
    others = iter(tensors_in(second))
    return map_tensors(lambda tensor: torch.cat([tensor, next(others)]), first)


def endless(data: Data) -> Iterator[Any]:
    """The batches over and over.

    Raises:
        DataError: There are none.
    """
    while True:
        batch = None
        for batch in data:
            yield batch
        if batch is None:
            raise DataError("there is nothing to replay; give batches, or a larger share")
