"""The one count of right answers: predicted classes that equal their labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from nss_prune.errors import DataError

Answer = tuple[Tensor, Any]
"""The classes that are predicted for a batch, ``[samples, ...]``, and their labels."""


def count_right(answers: Iterable[Answer]) -> tuple[int, int]:
    """How many predicted classes equal their labels, and how many there are.

    Raises:
        DataError: A batch has no labels, or not one class for each prediction.
    """
    right = count = 0
    for number, (found, labels) in enumerate(answers):
        if not isinstance(labels, Tensor) or labels.shape != found.shape:
            form = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                f"batch {number} has labels {form} for predicted classes {tuple(found.shape)}; "
                "accuracy needs batches of (inputs, labels), one class for each prediction"
            )
        right += int((found == labels.to(found.device)).sum())
        count += found.numel()
    return right, count


def share_right(answers: Iterable[Answer]) -> float:
    """Share of the predictions that are right, in [0, 1].

    Raises:
        DataError: As :func:`count_right`; or there are no samples.
    """
    right, count = count_right(answers)
    if not count:
        raise DataError("there are no samples; give an iterable of (inputs, labels) batches")
    return right / count
