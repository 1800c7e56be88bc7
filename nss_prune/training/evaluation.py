"""Losses and accuracies of batches of (inputs, labels)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.accuracy import count_right
from nss_prune.core.models import device_of, evaluation, run
from nss_prune.core.outputs import class_scores, cross_entropy
from nss_prune.core.processes import total
from nss_prune.errors import DataError
from nss_prune.profiling.accumulation import Loss


def mean_loss(loss: Loss | None, outputs: Any, labels: Tensor) -> Tensor:
    """The mean of a loss over the samples; cross entropy by default."""
    if loss is None or loss is cross_entropy:  # a sum over the samples
        return cross_entropy(outputs, labels) / len(labels)
    return loss(outputs, labels).mean()


def count_correct(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    classes: Collection[int] | None = None,
) -> tuple[int, int]:
    """How many predictions equal their labels, and how many there are.

    Args:
        model: In any mode; it predicts in evaluation mode.
        batches: Of (inputs, labels) on its device.
        classes: The outputs that compete; all by default.

    Raises:
        DataError: The model refuses a batch, or labels are not one class for each prediction.
    """
    own = None if classes is None else torch.tensor(sorted(classes))
    return count_right(
        (_predicted(model, inputs, number, own), labels)
        for number, (inputs, labels) in enumerate(batches)
    )


def _predicted(model: nn.Module, inputs: Any, number: int, own: Tensor | None) -> Tensor:
    """The class of the highest score, of those that compete; of all of them for None."""
    with evaluation(model), torch.no_grad():
        scores = class_scores(run(model, inputs, number))
    if own is None:
        return scores.argmax(1)
    own = own.to(scores.device)
    return own[scores.index_select(1, own).argmax(1)]


def accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Any, Tensor]],
    classes: Collection[int] | None = None,
) -> float:
    """Share of samples that a model gets right, over all processes, in [0, 1].

    Args:
        batches: Of (inputs, labels) on the model's device.
        classes: The outputs that compete; all by default.

    Raises:
        DataError: There are no samples, or the model refuses them.
    """
    right, samples = total(count_correct(model, batches, classes), device_of(model))
    if not samples:
        raise DataError("there are no samples; give an iterable of (inputs, labels) batches")
    return right / samples
