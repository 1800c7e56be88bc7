"""What a model's outputs mean: class scores, predictions and losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import as_computed, counted_batches
from nss_prune.core.models import run
from nss_prune.errors import DataError


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
    counted = labels[labels != -100]
    if counted.numel() == 0:
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {classes} classes: 0 to "
            f"{classes - 1}; correct the labels"
        )


def drawn_loss(scores: Tensor, generator: torch.Generator) -> Tensor:
    """A sum over samples whose gradient by the scores has the Fisher information for covariance.

    With random signs s, v = Σ_c s_c √p_c (1_c − p) has E[v vᵀ] = diag(p) − p pᵀ, as the gradient
    of −log p(y) with y drawn from p has. But a confident sample, where that is large for labels
    that are hardly ever drawn, shows as much in each draw. Scores are ``[samples, classes, ...]``.
    """
    by_place = scores.movedim(1, -1).flatten(0, -2)
    chances = by_place.detach().softmax(1)
    signs = torch.randint(2, chances.shape, generator=generator).to(chances) * 2 - 1
    roots = signs * chances.sqrt()
    return (by_place * (roots - chances * roots.sum(1, keepdim=True))).sum()


def scores_by_place(
    model: nn.Module, data: Iterable[Any], progress: bool | None, label: str
) -> Iterator[tuple[Tensor, int]]:
    """The class scores of every batch, ``[places, classes]`` sample by sample, and its samples.

    Raises:
        DataError: There is no batch, it cannot be used, or the model gives no class scores.
    """
    for number, inputs, samples in counted_batches(model, data, progress, label):
        scores = as_computed(class_scores(run(model, inputs, number)))
        yield scores.movedim(1, -1).flatten(0, -2), samples


def predictions(outputs: Any) -> Tensor:
    """The class with the highest score, ``[samples, ...]``."""
    return class_scores(outputs).argmax(1)
