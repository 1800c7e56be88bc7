"""Training on the data of a task, with a checkpoint after each epoch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nss_prune.adaptation.checkpoint import Checkpoint
from nss_prune.adaptation.datasets import Data, mixed
from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.partial_gradients import treats_entries_apart
from nss_prune.adaptation.training import Objective, OptimizerFactory, make_optimizer, one_pass
from nss_prune.core.models import run
from nss_prune.core.schema import record, whole
from nss_prune.errors import ArgumentError


@dataclass(frozen=True)
class TaskTraining:
    """How a task is trained.

    Attributes:
        epochs: Passes over the data, 1 or more.
        optimizer, learning_rate, weight_decay: As
            :func:`nss_prune.adaptation.training.make_optimizer` takes them.
        checkpoint: File to write after every epoch; None for none.
        resume: Where the checkpoint is there already, go on after its last epoch.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        ArgumentError: ``epochs`` is none.
    """

    epochs: int
    optimizer: str | OptimizerFactory = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    checkpoint: str | os.PathLike[str] | None = None
    resume: bool = True
    progress: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or self.epochs < 1:
            raise ArgumentError(f"epochs is {self.epochs!r}; give 1 or more")

    def run(
        self,
        freezing: Freezing,
        objective: Objective,
        data: Data,
        replayed: Data | None = None,
        purpose: Mapping[str, Any] | None = None,
    ) -> None:
        """Train up to the number of epochs, those of the checkpoint included.

        Args:
            freezing: What trains, of which model.
            objective: The loss.
            data: Batches of (inputs, labels) on the model's device.
            replayed: Batches to replay, one behind each of ``data``.
            purpose: Distinguishes the checkpoint from others of the model; anything JSON can hold.

        Raises:
            ArgumentError: timm does not make the optimiser.
            DataError: There is no batch, nothing to replay, or the model refuses a batch.
            FileFormatError, ModelMismatchError: The checkpoint is damaged or of another training.
            NumericalError: The loss or the weights became NaN or infinite.
        """
        updates = make_optimizer(
            freezing,
            self.optimizer,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
        )
        saved = Checkpoint(self.checkpoint, freezing, updates, purpose or {})
        found = saved.load(record({"epochs": whole()})) if self.resume else None
        done = 0 if found is None else found[0]["epochs"]

        def step(batch: tuple[Any, Tensor, int], number: int) -> Tensor:
            inputs, labels, own = batch
            loss = objective(run(freezing.model, inputs, number), labels, own)
            updates.zero_grad()
            loss.backward()
            updates.step()
            return loss.detach()

        zero_gradients = not treats_entries_apart(updates)
        with freezing.attach(updates, zero_gradients=zero_gradients), contextlib.ExitStack() as end:
            end.callback(updates.zero_grad)
            for epoch in range(done, self.epochs):
                title = f"epoch {epoch + 1}/{self.epochs}"
                one_pass(freezing.model, mixed(data, replayed), step, title, self.progress)
                saved.save({"epochs": epoch + 1})
