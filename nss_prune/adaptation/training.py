"""What trains of a model in part, by which optimiser, and the losses of tasks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.tasks import Task
from nss_prune.core.batches import as_computed
from nss_prune.core.outputs import class_scores
from nss_prune.errors import ArgumentError, DataError
from nss_prune.profiling.accumulation import Loss as Loss  # for the modules that train
from nss_prune.training.schedulers import optimizer_by_name
from nss_prune.training.settings import OptimizerFactory as OptimizerFactory
from nss_prune.training.settings import TrainingSettings


def make_optimizer(freezing: Freezing, settings: TrainingSettings) -> Optimizer:
    """The optimiser of a training.

    Args:
        freezing: What trains, of which model.
        settings: With the optimiser, or its name and options.

    Raises:
        ArgumentError: timm does not make it, or it has other parameters than the model.
    """
    optimizer = settings.optimizer
    if isinstance(optimizer, str):
        options = {
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "momentum": settings.momentum,
        }
        return optimizer_by_name(freezing.model, optimizer, options)
    if not isinstance(optimizer, Optimizer):
        named = freezing.model.named_parameters()
        optimizer = optimizer([value for name, value in named if name in freezing.trainable])
    own = set(freezing.model.parameters())
    for group in optimizer.param_groups:
        if not own.issuperset(group["params"]):
            raise ArgumentError(
                f"the {type(optimizer).__name__} has parameters that the model does not have; make "
                "it of model.parameters(), after the model is complete"
            )
    return optimizer


class TaskLoss:
    """Cross entropy over some of the outputs, one value for each sample.

    Args:
        classes: The outputs that compete.
    """

    def __init__(self, classes: Iterable[int]) -> None:
        self.classes = torch.tensor(sorted(set(classes)))

    def __call__(self, outputs: Any, labels: Any) -> Tensor:
        """``[samples]``.

        Raises:
            DataError: A label is none of the classes.
        """
        scores = class_scores(outputs)
        classes = self.classes.to(scores.device)
        labels = torch.as_tensor(labels).to(scores.device)
        targets = torch.searchsorted(classes, labels.long()).clamp(max=len(classes) - 1)
        if not torch.equal(classes[targets], labels.long()):
            strange = sorted(set(labels.tolist()) - set(self.classes.tolist()))
            raise DataError(
                f"labels {strange} are none of the task's classes {self.classes.tolist()}; give "
                "data whose labels are the same in every pass"
            )
        competing = as_computed(scores.index_select(1, classes))
        return functional.cross_entropy(competing, targets, reduction="none")


@dataclass(frozen=True)
class Objective:
    """The losses of a task's own samples and of replayed ones.

    Attributes:
        own: Function of (outputs, labels), one value for each sample or their mean.
        replayed: Likewise.
    """

    own: Loss
    replayed: Loss

    def __call__(self, outputs: Any, labels: Tensor, own: int) -> Tensor:
        """Their mean over all samples, of which the first ``own`` are the task's."""
        if own == len(labels):
            return self.own(outputs, labels).mean()
        scores = class_scores(outputs)
        first = self.own(scores[:own], labels[:own]).mean()
        second = self.replayed(scores[own:], labels[own:]).mean()
        share = own / len(labels)
        return share * first + (1 - share) * second


def objective_for(loss: Any, classes: Collection[int], tasks: Iterable[Task]) -> Objective:
    """The losses of a task by name, or a function for all samples.

    Args:
        loss: "task" or None, "all", or a function of (outputs, labels).
        classes: Those of the task.
        tasks: Those before it.

    Raises:
        ArgumentError: It is none of these.
    """
    if callable(loss):
        return Objective(loss, loss)
    earlier = {known for task in tasks for known in task.classes}
    if loss is None or loss == "task":
        return Objective(TaskLoss(classes), TaskLoss(earlier))
    if loss == "all":
        return Objective(*[TaskLoss({*earlier, *classes})] * 2)
    raise ArgumentError(f"loss is {loss!r}; use 'task', 'all' or a function")
