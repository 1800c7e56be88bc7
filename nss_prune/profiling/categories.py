"""Which category each sample counts for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nss_prune.core.outputs import class_scores
from nss_prune.errors import ArgumentError, DataError

Categories = Literal["labels", "predicted"] | Callable[[Any, Any, Any], Tensor] | None

UNLABELLED = -1
"""The category of samples without a label: rows of zeros. No label of a row has this index."""

IGNORED = -100
"""The label of samples that are not used: cross entropy ignores them as well."""

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

    Labels are one integer for each sample, or a row of zeros and ones for several, see
    :func:`members`.

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
    """Category -> indices of its samples, int64, in ascending order.

    Args:
        labels: ``[samples]`` or ``[samples, 1]``, one integer each (or floats that are all zeros
            and ones); samples whose label is ``IGNORED`` belong to no category. Or
            ``[samples, categories]`` of zeros and ones: a sample counts for each of its labels,
            and for the category ``UNLABELLED`` where it has none.

    Raises:
        DataError: The labels are of another form.
    """
    binary = bool(((labels == 0) | (labels == 1)).all())
    if labels.dim() == 2 and labels.shape[1] > 1 and len(labels) == samples and binary:
        return _members_of_rows(labels.bool())
    if labels.shape not in ((samples,), (samples, 1)) or (
        labels.is_floating_point() and not binary
    ):
        raise DataError(
            f"the categories are {labels.dtype} of shape {tuple(labels.shape)}; one integer for "
            f"each of the {samples} samples is needed, or a row of zeros and ones for each. For "
            "other labels pass a function as categories=, or categories=None"
        )
    labels = labels.flatten().long()
    present, counts = labels.unique(return_counts=True)
    order = labels.argsort(stable=True)
    found = dict(zip(present.tolist(), order.split(counts.tolist()), strict=True))
    found.pop(IGNORED, None)
    return found


def _members_of_rows(labels: Tensor) -> dict[int, Tensor]:
    columns = dict(enumerate(labels.unbind(1)))
    columns[UNLABELLED] = ~labels.any(1)
    found = {category: column.nonzero().flatten() for category, column in columns.items()}
    return {category: indices for category, indices in found.items() if len(indices)}


def count_used(membership: Mapping[int, Tensor]) -> int:
    """Number of samples that belong to a category, each counted once."""
    return len(torch.cat([*membership.values()]).unique()) if membership else 0


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
