"""Which category each sample counts for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from nss_prune.errors import ArgumentError, DataError

Categories = Literal["labels", "predicted"] | Callable[[Any, Any, Any], Tensor] | None

MINIMUM_SAMPLES = 8
"""Fewer samples than this are too few to compare; such categories join others."""


def check_categories(categories: Categories) -> None:
    """Raise ArgumentError unless ``categories`` is one of the choices."""
    if categories in ("labels", "predicted", None) or callable(categories):
        return
    raise ArgumentError(
        f"categories is {categories!r}; use 'labels', 'predicted', None (one category for all), "
        "or a function of (inputs, labels, outputs) that gives one integer for each sample"
    )


def assign(categories: Categories, inputs: Any, labels: Any, outputs: Any, samples: int) -> Tensor:
    """The category of each sample, ``[samples]``, int64, on the CPU.

    Raises:
        DataError: Labels are missing, or there is not one integer for each sample.
    """
    if categories is None:
        return torch.zeros(samples, dtype=torch.int64)
    if categories == "predicted":
        given: Any = class_scores(outputs).argmax(1)
    elif categories == "labels":
        given = labels
    else:
        assert callable(categories)
        given = categories(inputs, labels, outputs)
    if given is None:
        raise DataError(
            "categories='labels' needs (inputs, labels) batches; give labels, or "
            "categories='predicted' or None"
        )
    assigned: Tensor = torch.as_tensor(given)
    if assigned.shape != (samples,) or assigned.is_floating_point():
        raise DataError(
            f"the categories are {assigned.dtype} of shape {tuple(assigned.shape)}; one integer "
            f"for each of the {samples} samples is needed. For other labels pass a function as "
            "categories=, or categories=None for a single category"
        )
    return assigned.detach().cpu().long()


def class_scores(outputs: Any) -> Tensor:
    """The class scores in a model's output, ``[samples, classes, ...]``.

    Raises:
        DataError: There are none.
    """
    scores: Any = getattr(outputs, "logits", outputs)
    if isinstance(scores, (tuple, list)):
        scores = scores[0]
    if not isinstance(scores, Tensor) or scores.dim() < 2:
        kind = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise DataError(
            f"the model gives {kind}, not class scores [samples, classes]; pass "
            "loss=function(outputs, labels) and categories=None or a function"
        )
    return scores


def cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    """The default loss: cross entropy, summed over the samples.

    Raises:
        DataError: Labels that are not classes of the output.
    """
    scores = class_scores(outputs)
    labels = torch.as_tensor(labels).to(scores.device)
    if labels.is_floating_point() or labels.shape != (scores.shape[0], *scores.shape[2:]):
        raise DataError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} for outputs "
            f"{tuple(scores.shape)}; class indices are needed, or loss=function(outputs, labels)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= scores.shape[1]:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {scores.shape[1]} classes: "
            f"0 to {scores.shape[1] - 1}; correct the labels"
        )
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    return torch.nn.functional.cross_entropy(scores, labels.long(), reduction="sum")


def joined(counts: dict[int, int], minimum: int = MINIMUM_SAMPLES) -> dict[int, tuple[int, ...]]:
    """Categories with enough samples to compare.

    Categories with fewer than ``minimum`` samples form one together; where even that is too
    small it joins the smallest category that is large enough, and where there is none, all data
    is one category.

    Args:
        counts: Category -> number of samples.

    Returns:
        First of the joined categories -> all that count as one, in ascending order.
    """
    large = [category for category in sorted(counts) if counts[category] >= minimum]
    small = [category for category in sorted(counts) if counts[category] < minimum]
    parts = [[category] for category in large]
    if small and large and sum(counts[category] for category in small) < minimum:
        smallest = min(range(len(large)), key=lambda i: counts[large[i]])
        parts[smallest] += small
    elif small:
        parts.append(small)
    return {min(part): tuple(sorted(part)) for part in sorted(parts, key=min)}
