"""What a validation says of a model: its score after each epoch, and the accuracy of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from torch import nn

from nss_prune.adaptation.datasets import Data, on_device_of
from nss_prune.core.models import device_of
from nss_prune.core.processes import agreed, processes, total
from nss_prune.training.evaluation import accuracy
from nss_prune.training.loop import Validate

Validation = Data | Callable[[nn.Module], float]
"""Batches of (inputs, labels), or a function of the model that gives a score, larger for better."""


def score_by(function: Callable[[nn.Module], float], model: nn.Module) -> float:
    """The mean over all processes of what a function gives."""
    return total([float(function(model))], device_of(model))[0] / processes()


def validation_of_task(
    model: nn.Module, validation: Validation | None, classes: Collection[int]
) -> Validate | None:
    """What gives the score of a task: the accuracy among its own classes, or what a function gives.

    Args:
        model: As it is, masked or whole.
        classes: The outputs that the task owns.
    """
    if validation is None:
        return None
    if callable(validation):
        function = validation
        return lambda: {"score": score_by(function, model)}
    batches = on_device_of(model, validation)

    def validate() -> dict[str, float]:
        found = accuracy(model, batches, classes)
        return {"accuracy": found, "score": found}

    return validate


@agreed()
def accuracy_of_task(model: nn.Module, validation: Validation | None) -> float:
    """The accuracy of a model that answers for a task; NaN without validation batches."""
    if validation is None or callable(validation):
        return math.nan
    return accuracy(model, on_device_of(model, validation))
