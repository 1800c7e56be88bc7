"""Batches for fine-tuning: (inputs, labels), or inputs alone where a teacher is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.adaptation.datasets import Data as Data
from nss_prune.adaptation.datasets import repeatable
from nss_prune.core.batches import split_batch
from nss_prune.core.models import device_of, evaluation, run
from nss_prune.core.nested import moved
from nss_prune.core.outputs import class_scores
from nss_prune.errors import DataError


class Placed:
    """(inputs, labels or None) on the device of a model, as often as asked.

    Args:
        model: Whose device it is.
        data: Batches on any device.

    Raises:
        DataError: They can be iterated only once.
    """

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.model = model
        self.data = repeatable(data)

    def __iter__(self) -> Iterator[tuple[Any, Tensor | None]]:
        device = device_of(self.model)
        for batch in self.data:
            inputs, labels = split_batch(batch)
            if labels is not None:
                labels = torch.as_tensor(labels).to(device, non_blocking=True)
            yield moved(inputs, device), labels

    @torch.no_grad()
    def classes(self) -> int:
        """Number of classes that the model scores.

        Raises:
            DataError: There is no batch, or the model gives no class scores.
        """
        first = next(iter(self), None)
        if first is None:
            raise DataError("the data has no batch; give an iterable of (inputs, labels) batches")
        with evaluation(self.model):
            return int(class_scores(run(self.model, first[0], 0)).shape[1])
