"""Accuracy on held-out batches, as a score of models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nss_prune.core.accuracy import count_right
from nss_prune.core.batches import labelled_batches
from nss_prune.core.models import Forward, call_model, evaluation, run
from nss_prune.core.outputs import predictions
from nss_prune.core.processes import total_by_key
from nss_prune.errors import ArgumentError, DataError
from nss_prune.pruner.strategy import Score


def accuracy_on(batches: Iterable[Any], forward: Forward = call_model) -> Score:
    """A function of a model: its accuracy on the batches of all processes, in percent.

    A ``score=`` of :class:`nss_prune.NSSPruner`::

        NSSPruner(model, example_inputs, data=loader, score=accuracy_on(held_out), max_drop=1.0)

    Args:
        batches: Of (inputs, labels), the classes of the samples, on the model's device; a list or
            a DataLoader. With ``classes=`` the labels are positions among these.
        forward: Calls a model on the inputs.

    Raises:
        ArgumentError: The batches can be iterated only once.
    """
    if isinstance(batches, Iterator):
        raise ArgumentError(
            f"the batches are a {type(batches).__name__}, which can be iterated only once; give a "
            "list or a DataLoader"
        )
    return _Accuracy(batches, forward)


@dataclass(frozen=True)
class _Accuracy:
    batches: Iterable[Any]
    forward: Forward

    def __call__(self, model: nn.Module) -> float:
        with evaluation(model), torch.no_grad():
            right, total = count_right(
                (predictions(run(model, inputs, number, self.forward)), labels)
                for number, inputs, labels, _ in labelled_batches(
                    model, self.batches, False, "score"
                )
            )
        found = total_by_key({"right": right, "total": total})
        if not found["total"]:
            raise DataError("there are no samples to score; give batches of (inputs, labels)")
        return 100 * found["right"] / found["total"]
