"""Fine-tune a smaller model in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from nss_prune.adaptation.freezing import train_all
from nss_prune.core.processes import copy_from_first
from nss_prune.core.undo import restored_on_error
from nss_prune.finetuning.batches import Data, Placed
from nss_prune.finetuning.learner import FinetuneLearner, Progress
from nss_prune.finetuning.mixing import loss_by_name
from nss_prune.finetuning.recipe import Recipe
from nss_prune.finetuning.validating import Metric, Validating, Validation
from nss_prune.training.logs import call_all, logs_in
from nss_prune.training.settings import Metrics, TrainingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nss_prune.finetuning.recipe import FinetuneArguments


@dataclass(frozen=True)
class FinetuneResult:
    """What a fine-tuning came to.

    Attributes:
        history: Metrics of each epoch, see :data:`nss_prune.training.settings.Metrics`.
        epochs: How many there were, those of a checkpoint included.
        best_epoch: With the best score, from 1, whose values the model has; None without a
            validation, where it has those of the last epoch.
        metrics: Of that epoch.
        seconds: Time spent on training, without validation.
        stopped_early: Whether patience ended it.
    """

    history: tuple[Metrics, ...]
    epochs: int
    best_epoch: int | None
    metrics: Metrics
    seconds: float
    stopped_early: bool

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        end = ", stopped early" if self.stopped_early else ""
        return f"FinetuneResult({self.epochs} epochs in {self.seconds:.1f} s{end}; {shown})"


def finetune(
    model: nn.Module,
    data: Data,
    teacher: nn.Module | None = None,
    validation: Validation | None = None,
    *,
    metrics: Mapping[str, Metric] | None = None,
    monitor: str = "accuracy",
    log: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    **arguments: Unpack[FinetuneArguments],
) -> FinetuneResult:
    """Train a smaller model on, by the labels and by the model that it was made from::

        whole = copy.deepcopy(model)
        NSSPruner(model, example_inputs, macs_budget=0.6, data=loader).step()
        finetune(model, loader, teacher=whole, validation=held_out, epochs=5)

    Under torchrun, gradients are averaged over the processes; each needs its own part of the data,
    of the same number of batches (as a DistributedSampler gives). All end with the same model.

    Args:
        model: Trained in place, on any device; not wrapped. Its mode and flags stay as they are.
        data: Batches of (inputs, labels) that can be gone through repeatedly, on any device; of
            inputs alone with a teacher and ``distillation=1``.
        teacher: The whole model, on the model's device; nothing of it changes.
        validation: Other batches, on which the accuracy is measured after each epoch; or a
            function of the model that gives a score, larger for better, or metrics by name. The
            model has the values of its best epoch in the end.
        metrics: Name -> metric of torchmetrics, for the validation batches.
        monitor: Name of the metric that says which epoch is best; "-name" where less is better.
        log: Folder for history.csv, and for TensorBoard's events where that is installed.
        progress: Whether to show a bar; by default in a terminal.
        **arguments: ``distillation``, ``temperature``, ``features``, ``mixup``, ``ema`` and others,
            see :class:`nss_prune.finetuning.recipe.Recipe`; ``epochs``, ``optimizer``, ``amp``,
            ``patience``, ``checkpoint``, ``on_epoch`` and others, see
            :class:`nss_prune.training.settings.TrainingSettings`. ``loss`` may be the name of one
            of timm's, such as "BinaryCrossEntropy"; ``scheduler`` is "cosine" by default.

    Raises:
        ArgumentError: An argument is outside what it may be.
        DataError: There are no batches, or the model or its teacher refuses them.
        FileFormatError, ModelMismatchError: The checkpoint is damaged, of another model or of
            other hyper-parameters; or the teacher is of another model.
        NumericalError: The loss or the weights became NaN or infinite. Whatever is raised, the
            model is as it was before the call.
    """
    recipe, others = Recipe.taken_from(arguments)
    settings = _settings(others, validation, log)
    taught = recipe.taught_by(teacher, model)
    batches = Placed(model, data)
    learner = FinetuneLearner(
        train_all(model), settings, taught, recipe.mixing(batches.classes), recipe.ema
    )
    validate = Validating.of(model, validation, metrics or {}, monitor)
    copy_from_first(model)
    with restored_on_error(model, values=True, optimizer=learner.optimizer):
        done = learner.run(batches, recipe.identity(taught), validate, progress)
    return _result(done, settings)


def _settings(
    training: Mapping[str, Any], validation: Validation | None, log: str | os.PathLike[str] | None
) -> TrainingSettings:
    best = training.get("restore_best", validation is not None)
    settings = TrainingSettings.of(training, scheduler="cosine")
    settings = replace(settings, restore_best=best)
    settings.check_validation(validation)
    if isinstance(settings.loss, str):
        settings = replace(settings, loss=loss_by_name(settings.loss))
    if log is None:
        return settings
    own = [] if settings.on_epoch is None else [settings.on_epoch]
    return replace(settings, on_epoch=call_all([*logs_in(log), *own]))


def _result(done: Progress, settings: TrainingSettings) -> FinetuneResult:
    position = done.best_epoch if settings.keeps_best else None
    return FinetuneResult(
        history=tuple(done.history),
        epochs=len(done.history),
        best_epoch=None if position is None else position + 1,
        metrics=done.history[-1 if position is None else position],
        seconds=done.seconds,
        stopped_early=len(done.history) < settings.epochs,
    )
