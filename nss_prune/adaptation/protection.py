"""What learned tasks need of a model: entries of parameters and channels of statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.adaptation.freezing import critical_channels, critical_entries
from nss_prune.adaptation.isolation import isolated_part
from nss_prune.adaptation.tasks import Task
from nss_prune.core.classifier import outputs_of
from nss_prune.core.models import submodule
from nss_prune.errors import ModelMismatchError
from nss_prune.graph.axes import parameter_axes
from nss_prune.graph.slices import Slice


def needed_entries(
    task: Task, model: nn.Module, classifier: str, critical: Slice | None = None
) -> dict[str, Tensor]:
    """Parameter -> True for the entries that a task needs, of its shape.

    Of the classifier these are in the task's own rows.

    Args:
        classifier: Name of the layer that makes the outputs.
        critical: In place of the task's slice.

    Raises:
        ModelMismatchError: The slice is of another model.
    """
    entries = critical_entries(critical or task.slice, model)
    for name, kept in task.weights.items():
        entries[name] &= kept.to(entries[name].device)
    others = torch.ones(outputs_of(model, classifier), dtype=torch.bool)
    others[list(task.classes)] = False
    for key, (rows, _) in parameter_axes(submodule(model, classifier)).items():
        mask = entries[f"{classifier}.{key}" if classifier else key]
        mask.index_fill_(rows, others.nonzero().flatten().to(mask.device), False)
    return entries


def all_needed_entries(
    tasks: Sequence[Task],
    model: nn.Module,
    classifier: str,
    slices: Sequence[Slice] | None = None,
) -> dict[str, Tensor]:
    """Parameter -> True for the entries that one of several tasks needs, of its shape.

    Args:
        classifier: Name of the layer that makes the outputs.
        slices: In place of those of the tasks, one for each.
    """
    needed = {
        name: torch.zeros_like(value, dtype=torch.bool) for name, value in model.named_parameters()
    }
    used = [task.slice for task in tasks] if slices is None else slices
    for task, critical in zip(tasks, used, strict=True):
        for name, entries in needed_entries(task, model, classifier, critical).items():
            needed[name] |= entries
    return needed


def needed_channels(slices: Sequence[Slice], model: nn.Module) -> dict[str, Tensor]:
    """Norm -> True where its running statistics are needed by one of the slices, ``[channels]``."""
    needed: dict[str, Tensor] = {}
    for critical in slices:
        for name, kept in critical_channels(critical, model).items():
            needed[name] = needed.get(name, torch.zeros_like(kept)) | kept
    return needed


def isolated_slices(tasks: Sequence[Task], model: nn.Module, inputs: Any) -> list[Slice]:
    """For each task, the layers of its slice whose other neurons do not matter under its mask.

    Args:
        inputs: Of one call of the model, on its device.

    Raises:
        ModelMismatchError: A mask does not cut a path between layers.
    """
    found = []
    for task in tasks:
        try:
            found.append(isolated_part(task.slice, model, inputs))
        except ModelMismatchError as error:
            raise ModelMismatchError(f"{task.name!r} cannot be protected: {error}") from error
    return found


def free_neurons(slices: Sequence[Slice]) -> dict[str, int]:
    """Layer that all slices have -> neurons that are critical in none of them."""
    kept = [critical.kept for critical in slices]
    shared = [name for name in kept[0] if all(name in other for other in kept)]
    return {
        name: int((~torch.stack([other[name] for other in kept])).all(0).sum()) for name in shared
    }
