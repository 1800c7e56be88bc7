"""What scripts for torch-pruning's other pruners call, and NSSPruner has no use for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch_pruning as tp

from nss_prune.errors import ArgumentError

AFTER_IMPORTANCE = tuple(inspect.signature(tp.pruner.BasePruner).parameters)[3:]


class WithoutRegularizer(tp.pruner.BasePruner):  # type: ignore[misc]
    """torch-pruning's pruner, of which the regularizers are refused in words."""

    def regularize(self, *arguments: Any, **keywords: Any) -> NoReturn:
        """Raise ArgumentError: there is no sparse training here."""
        raise ArgumentError(
            "NSSPruner does not regularize, it removes neurons from a trained model; for sparse "
            "training use tp.pruner.GroupNormPruner or BNScalePruner, and then this one with "
            "importance="
        )

    update_regularizer = regularize


def by_position(values: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """torch-pruning's arguments after ``importance``, given by position, and those by name.

    Raises:
        ArgumentError: There are too many, or one is given twice.
    """
    given = dict(zip(AFTER_IMPORTANCE, values, strict=False))
    twice = [name for name in given if name in named]
    if twice or len(values) > len(AFTER_IMPORTANCE):
        raise ArgumentError(
            f"{len(values)} arguments after importance by position, {', '.join(twice) or 'none'} "
            f"also by name; torch-pruning's are {', '.join(AFTER_IMPORTANCE)}: give them by name"
        )
    return {**given, **named}
