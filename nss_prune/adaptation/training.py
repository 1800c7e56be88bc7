"""What the trainers share: an optimiser, losses, and one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from tqdm.auto import tqdm

from nss_prune.adaptation.freezing import Freezing
from nss_prune.core.batches import as_computed
from nss_prune.core.models import evaluation, run
from nss_prune.core.outputs import class_scores, cross_entropy
from nss_prune.core.processes import is_first
from nss_prune.errors import ArgumentError, DataError, NumericalError
from nss_prune.profiling.accumulation import Loss as Loss  # for the modules that train

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Function of the parameters that train, wholly or in part."""

FUSED = ("adam", "adamw")
"""Optimisers to be fused where possible: else the zeros of frozen entries are slow on a CPU."""


def make_optimizer(
    freezing: Freezing,
    optimizer: str | Optimizer | OptimizerFactory,
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float = 0.9,
) -> Optimizer:
    """The optimiser of a training.

    Args:
        freezing: What trains, of which model.
        optimizer: A name that timm knows, an optimiser of the model's parameters, or a function
            of the list of those that train.
        learning_rate: For an optimiser by name, as ``momentum`` and ``weight_decay`` are, from
            which biases and norms are exempt.

    Raises:
        ArgumentError: timm does not make it, or it has other parameters than the model.
    """
    if isinstance(optimizer, str):
        options = {"lr": learning_rate, "weight_decay": weight_decay, "momentum": momentum}
        return _by_name(freezing.model, optimizer, options)
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


def _by_name(model: nn.Module, name: str, options: dict[str, float]) -> Optimizer:
    if name.lower() in FUSED:
        try:
            return _timm_optimizer(model, name, {**options, "fused": True})
        except ArgumentError:
            pass  # not on this device, not of these types, or not with these options
    return _timm_optimizer(model, name, options)


def _timm_optimizer(model: nn.Module, name: str, options: dict[str, Any]) -> Optimizer:
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # here: it takes long

    try:
        made: Optimizer = create_optimizer_v2(model, opt=name, **options)
    except Exception as error:  # each optimiser has its own
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ArgumentError(
            f"timm makes no optimiser {name!r} with {given}: {error}; use a name of "
            "timm.optim.list_optimizers(), an optimiser, or a function of the parameters"
        ) from error
    return made


def make_scheduler(name: str | None, optimizer: Optimizer, epochs: int) -> Any:
    """The scheduler of a training, stepped with (epoch, score); None without a name.

    Raises:
        ArgumentError: timm does not make it.
    """
    if name is None:
        return None
    from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]  # it takes long

    try:
        scheduler, _ = create_scheduler_v2(optimizer, sched=name, num_epochs=epochs)
    except Exception as error:
        raise ArgumentError(f"timm makes no scheduler {name!r}: {error}") from error
    if scheduler is None:
        raise ArgumentError(f"timm has no scheduler {name!r}; use 'cosine', 'step', ..., or None")
    return scheduler


def one_pass(
    model: nn.Module,
    batches: Iterable[Any],
    step: Callable[[Any, int], Tensor],
    title: str,
    progress: bool | None = None,
) -> float:
    """Train on every batch once.

    Args:
        model: It is put into training mode.
        step: Trains on (batch, number of the batch) and gives its loss, detached.
        title: For the progress bar and messages.
        progress: Whether to show a bar; by default in a terminal.

    Returns:
        The mean loss.

    Raises:
        DataError: There is no batch.
        NumericalError: The loss, or a parameter afterwards, is NaN or infinite.
    """
    hidden = not is_first() or (None if progress is None else not progress)
    total: Tensor | None = None
    number = -1
    model.train()
    with tqdm(batches, title, unit="batch", leave=False, disable=hidden) as bar:
        for number, batch in enumerate(bar):
            loss = step(batch, number)
            total = loss if total is None else total + loss
    if total is None:
        raise DataError("the data has no batch; give batches that can be iterated repeatedly")
    mean = float(total) / (number + 1)
    finite = [parameter.isfinite().all() for parameter in model.parameters()]
    if not math.isfinite(mean) or not bool(torch.stack(finite).all()):
        what = "weights are not finite" if math.isfinite(mean) else f"the mean loss is {mean}"
        raise NumericalError(
            f"{title}: {what}; use a smaller learning rate, and check the data for NaN"
        )
    return mean


def mean_loss(loss: Loss | None, outputs: Any, labels: Tensor) -> Tensor:
    """The mean of a loss over the samples; cross entropy by default."""
    if loss is None or loss is cross_entropy:  # a sum over the samples
        return cross_entropy(outputs, labels) / len(labels)
    return loss(outputs, labels).mean()


def count_correct(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> tuple[int, int]:
    """How many predictions equal their labels, and how many there are.

    Args:
        model: In any mode; it predicts in evaluation mode.
        batches: Of (inputs, labels) on its device.

    Raises:
        DataError: The model refuses a batch.
    """
    right = samples = 0
    for number, (inputs, labels) in enumerate(batches):
        with evaluation(model), torch.no_grad():
            found = class_scores(run(model, inputs, number)).argmax(1)
        right += int((found == labels).sum())
        samples += labels.numel()
    return right, samples


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
