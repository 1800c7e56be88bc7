"""Training on the data of a task, under what earlier tasks need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nss_prune.adaptation.checkpoint import Checkpoint
from nss_prune.adaptation.datasets import Data, mixed
from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.packing import treats_entries_apart
from nss_prune.adaptation.training import Objective, make_optimizer
from nss_prune.adaptation.validation import Validation as Validation
from nss_prune.adaptation.validation import validation_of_task
from nss_prune.core.models import run
from nss_prune.core.processes import agreed, copy_from_first
from nss_prune.training.learner import Learner
from nss_prune.training.loop import train
from nss_prune.training.settings import Metrics as Metrics
from nss_prune.training.settings import TrainingArguments as TrainingArguments
from nss_prune.training.settings import TrainingSettings


class TaskLearner(Learner):
    """Trains what a freezing leaves to train, on a task's samples and replayed ones.

    Args:
        freezing: What trains, of which model.
        optimizer: Of the model's parameters.
        objective: The loss.
        zero_gradients: As :meth:`Freezing.attach` takes it.
    """

    def __init__(
        self,
        freezing: Freezing,
        optimizer: Optimizer,
        objective: Objective,
        *,
        zero_gradients: bool,
    ) -> None:
        super().__init__(freezing.model, optimizer)
        self.freezing = freezing
        self.objective = objective
        self.zero_gradients = zero_gradients

    @contextlib.contextmanager
    def attach(self) -> Iterator[None]:
        """Within the context, what is frozen keeps its bits."""
        attached = self.freezing.attach(self.optimizer, zero_gradients=self.zero_gradients)
        with attached, contextlib.ExitStack() as end:
            end.callback(self.optimizer.zero_grad)
            yield

    def loss(self, batch: tuple[Any, Tensor, int], number: int) -> Tensor:
        """That of a batch of (inputs, labels, number of own samples)."""
        inputs, labels, own = batch
        return self.objective(run(self.model, inputs, number), labels, own)


class Mixed:
    """(inputs, labels, number of own samples), as often as asked: see :func:`mixed`."""

    def __init__(self, data: Data, replayed: Data | None) -> None:
        self.data = data
        self.replayed = replayed

    def __iter__(self) -> Iterator[tuple[Any, Tensor, int]]:
        return mixed(self.data, self.replayed)


@dataclass(frozen=True)
class TaskTraining:
    """How a task is trained.

    Attributes:
        settings: Of the training.
        validation: Of the task, what gives the score after each epoch.
        progress: Show a progress bar; None for only on a terminal.
    """

    settings: TrainingSettings
    validation: Validation | None = None
    progress: bool | None = None

    @staticmethod
    def of(
        training: Mapping[str, Any], validation: Validation | None, progress: bool | None
    ) -> TaskTraining:
        """The training that some keywords ask for.

        Raises:
            ArgumentError: One is outside what it may be.
        """
        settings = TrainingSettings.of(training)
        settings.check_validation(validation)
        return TaskTraining(settings, validation, progress)

    @agreed()
    def run(
        self,
        freezing: Freezing,
        objective: Objective,
        data: Data,
        *,
        replayed: Data | None = None,
        classes: Sequence[int],
        purpose: Mapping[str, Any],
    ) -> tuple[Metrics, ...]:
        """Train up to the number of epochs, those of the checkpoint included.

        Args:
            freezing: What trains, of which model.
            objective: The loss.
            data: Batches of (inputs, labels) on the model's device.
            replayed: Batches to replay, one behind each of ``data``.
            classes: The outputs that the task owns.
            purpose: Distinguishes the checkpoint from others of the model; anything JSON can hold.

        Returns:
            Metrics of each epoch.

        Raises:
            ArgumentError: timm does not make the optimiser or the scheduler.
            DataError: There is no batch, nothing to replay, or the model refuses a batch.
            FileFormatError, ModelMismatchError: The checkpoint is damaged or of another training.
            NumericalError: The loss or the weights became NaN or infinite.
        """
        settings = self.settings
        copy_from_first(freezing.model)
        optimizer = make_optimizer(freezing, settings)
        reads_gradients = settings.clip_norm is not None or settings.amp == torch.float16
        learner = TaskLearner(
            freezing,
            optimizer,
            objective,
            zero_gradients=reads_gradients or not treats_entries_apart(optimizer),
        )
        saved = Checkpoint(
            settings.checkpoint,
            freezing,
            optimizer,
            {**purpose, "classes": list(classes), **settings.hyper_parameters(optimizer)},
        )
        done = train(
            learner,
            Mixed(data, replayed),
            settings,
            saved=saved,
            validate=validation_of_task(freezing.model, self.validation, classes),
            progress=self.progress,
        )
        return tuple(done.history)
