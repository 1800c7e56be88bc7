"""The samples of some classes, and all samples where those are few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nss_prune.allocation.effects import LEAST_SAMPLES
from nss_prune.core.batches import has_samples, pick_samples, split_batch
from nss_prune.core.views import Views
from nss_prune.errors import DataError


class OfClasses:
    """Batches of the samples of some classes, labelled by their positions among these.

    Args:
        data: Batches of (inputs, labels); labels are ``[samples]`` classes, or a row of zeros and
            ones for each sample, of which those with one of the classes stay.

    Raises:
        DataError: When iterated: labels are missing or of another form, or no sample is left.
    """

    def __init__(self, data: Iterable[Any], classes: Sequence[int]) -> None:
        self._data = data
        self._classes = torch.tensor(classes)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        empty = True
        for batch in self._data:
            inputs, labels = split_batch(batch)
            indices, remapped = self._selected(labels)
            if len(indices):
                empty = False
                yield pick_samples(inputs, indices), remapped
        if empty:
            raise DataError(
                f"no sample of the data is of the classes {self._classes.tolist()}; give data "
                "with labels among them"
            )

    def _selected(self, labels: Any) -> tuple[Tensor, Tensor]:
        """Samples that stay, and their labels."""
        if not isinstance(labels, Tensor):
            raise DataError(
                f"the labels of a batch are {type(labels).__name__}; classes= picks samples by "
                "labels, a tensor for each batch"
            )
        classes = self._classes.to(labels.device)
        if labels.dim() == 2 and labels.shape[1] > 1:
            rows = labels[:, classes]
            indices = (rows != 0).any(1).nonzero().flatten()
            return indices, rows[indices]
        if (labels.dim() != 1 and labels.shape[1:] != (1,)) or labels.is_floating_point():
            raise DataError(
                f"the labels are {labels.dtype} of shape {tuple(labels.shape)}; classes= needs one "
                "class for each sample, or a row of zeros and ones"
            )
        same = labels.flatten()[:, None] == classes
        indices = same.any(1).nonzero().flatten()
        return indices, same[indices].long().argmax(1)


class EnoughSamples:
    """Batches of the samples of some classes; of all samples where those are few.

    How activations vary is then better known from all samples, and what must not change is still
    the scores of these classes. Labels are left out, since most are of other classes.

    Args:
        data: As :class:`OfClasses` takes it, which can be iterated again.

    Raises:
        DataError: When iterated, as of :class:`OfClasses`.
    """

    def __init__(self, data: Iterable[Any], classes: Sequence[int]) -> None:
        self._data = data
        self._own = OfClasses(data, classes)

    @cached_property
    def has_all(self) -> bool:
        """Whether it has all samples."""
        return not has_samples(self._own, LEAST_SAMPLES)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if not self.has_all:
            yield from self._own
            return
        for batch in self._data:
            yield split_batch(batch)[0], None


def of_classes(data: Iterable[Any], classes: Sequence[int], enough: bool = False) -> Iterable[Any]:
    """The data of some classes; what can be iterated again still can, and views stay views.

    Args:
        enough: All samples where fewer than :data:`LEAST_SAMPLES` are of the classes and the data
            can be iterated again.
    """
    if isinstance(data, Views):
        return Views(of_classes(data.data, classes, enough), *data.transforms)
    if isinstance(data, Iterator):
        return iter(OfClasses(data, classes))
    return EnoughSamples(data, classes) if enough else OfClasses(data, classes)


def remark(data: Any) -> str:
    """For the end of a note: that there are all samples; "" where there are not."""
    samples = data.data if isinstance(data, Views) else data
    if not isinstance(samples, EnoughSamples) or not samples.has_all:
        return ""
    return f"; all samples calibrate, since fewer than {LEAST_SAMPLES} are of these classes"
