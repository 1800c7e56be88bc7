"""torch-pruning's criteria, with its defaults, and the gradients that two of them take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batches = Iterable[tuple[Tensor, Tensor]]

CRITERIA: dict[str, Callable[[], Any]] = {
    "magnitude-l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "magnitude-l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn-scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "random": tp.importance.RandomImportance,
}


def mean_gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Parameter -> the gradient of the mean loss over the data."""
    found = _zeros_like_parameters(model)
    for inputs, labels in batches:
        _add_gradients(found, model, inputs, labels, 1)
    return _scaled(found, batches)


def squared_gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Parameter -> the mean over the samples of their squared gradients.

    GroupHessianImportance.accumulate_grad of torch-pruning 1.6 keeps the last sample's alone.
    """
    found = _zeros_like_parameters(model)
    for inputs, labels in batches:
        for picture, label in zip(inputs.split(1), labels.split(1), strict=True):
            _add_gradients(found, model, picture, label, 2)
    return _scaled(found, batches)


GRADIENTS = {"taylor": mean_gradients, "hessian": squared_gradients}


def set_gradients(model: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Put gradients where torch-pruning's criteria look for them, by parameter."""
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].clone()


def _zeros_like_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in model.named_parameters()}


def _add_gradients(
    total: dict[str, Tensor], model: nn.Module, inputs: Tensor, labels: Tensor, power: int
) -> None:
    parameters = dict(model.named_parameters())
    loss = cross_entropy(model(inputs), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            total[name] += gradient**power


def _scaled(total: dict[str, Tensor], batches: Batches) -> dict[str, Tensor]:
    samples = sum(len(labels) for _, labels in batches)
    return {name: value / samples for name, value in total.items()}
