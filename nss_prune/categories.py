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


def assign(
    categories: Categories, inputs: Any, labels: Any, outputs: Any, samples: int
) -> dict[int, Tensor]:
    """Category -> indices of its samples in the batch, int64 on the CPU, in ascending order.

    Labels are one integer for each sample, or a row of zeros and ones for several: then a sample
    counts for each of its labels.

    Raises:
        DataError: Labels are missing or of another form.
    """
    if categories is None:
        return {0: torch.arange(samples)}
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
    return members(torch.as_tensor(given).detach().cpu(), samples)


def members(labels: Tensor, samples: int) -> dict[int, Tensor]:
    """Category -> indices of its samples, from ``[samples]`` or ``[samples, categories]``."""
    if labels.dim() == 2 and len(labels) == samples and ((labels == 0) | (labels == 1)).all():
        columns = {c: labels[:, c].nonzero().flatten() for c in range(labels.shape[1])}
        return {category: indices for category, indices in columns.items() if len(indices)}
    if labels.shape != (samples,) or labels.is_floating_point():
        raise DataError(
            f"the categories are {labels.dtype} of shape {tuple(labels.shape)}; one integer for "
            f"each of the {samples} samples is needed, or a row of zeros and ones for each. For "
            "other labels pass a function as categories=, or categories=None"
        )
    order = labels.long().argsort(stable=True)
    present, counts = labels.unique(return_counts=True)
    return dict(zip(present.tolist(), order.split(counts.tolist()), strict=True))


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


def cross_entropy(outputs: Any, labels: Any) -> Tensor:
    """The default loss, summed over the samples.

    Cross entropy with class indices ``[samples, ...]``; binary cross entropy where the labels
    are zeros and ones of the shape of the scores (several labels for a sample).

    Raises:
        DataError: Labels that are not classes of the output.
    """
    scores = class_scores(outputs)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    labels = torch.as_tensor(labels).to(scores.device)
    functional = torch.nn.functional
    if labels.shape == scores.shape and ((labels == 0) | (labels == 1)).all():
        return functional.binary_cross_entropy_with_logits(
            scores, labels.to(scores.dtype), reduction="sum"
        )
    if labels.is_floating_point() or labels.shape != (scores.shape[0], *scores.shape[2:]):
        raise DataError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} for outputs "
            f"{tuple(scores.shape)}; class indices are needed, or loss=function(outputs, labels)"
        )
    check_range(labels, scores.shape[1])
    return functional.cross_entropy(scores, labels.long(), reduction="sum")


def check_range(labels: Tensor, classes: int) -> None:
    """Raise DataError unless all labels are classes; -100 is cross entropy's 'ignore'."""
    counted = labels[labels != -100] if labels.dim() > 1 else labels
    if counted.numel() == 0:
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {classes} classes: 0 to "
            f"{classes - 1}; correct the labels"
        )


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
