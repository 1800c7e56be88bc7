"""A step of fine-tuning: labels, mixed samples, a teacher, and an average of the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nss_prune.adaptation.checkpoint import Checkpoint
from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.training import make_optimizer
from nss_prune.core.models import flags_kept, run
from nss_prune.core.outputs import class_scores
from nss_prune.errors import DataError
from nss_prune.finetuning.distillation import (
    Distillation,
    as_computed,
    receiving,
    similarity_loss,
    soft_loss,
)
from nss_prune.training.evaluation import mean_loss
from nss_prune.training.learner import Learner
from nss_prune.training.loop import Validate, train
from nss_prune.training.progress import Progress as Progress
from nss_prune.training.settings import TrainingSettings

AVERAGE = "nss_prune average"
"""Key of the averages in the state of the optimiser, so that a checkpoint has them."""

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Function of (inputs, labels) that gives mixed inputs and the probabilities of the classes."""


@dataclass(frozen=True)
class Sample:
    """A batch that is ready to be learned.

    Attributes:
        inputs: Of one call of the model.
        labels: Or probabilities of the classes; None where a teacher is enough.
        scores: Of the teacher, if there is one.
        received: What the teacher's consumers receive.
    """

    inputs: Any
    labels: Tensor | None
    scores: Tensor | None
    received: list[Tensor]


class FinetuneLearner(Learner):
    """Trains the whole of a model.

    Args:
        freezing: Everything trains.
        settings: Of the training.
        distillation: From a teacher, or None.
        mixing: Of samples, or None.
        decay: Of the average of the parameters, e ← decay e + (1 − decay) w after each step, which
            begins with what the first step gave; None for none.
    """

    def __init__(
        self,
        freezing: Freezing,
        settings: TrainingSettings,
        distillation: Distillation | None,
        mixing: Mixing | None,
        decay: float | None,
    ) -> None:
        super().__init__(freezing.model, make_optimizer(freezing, settings))
        self.freezing = freezing
        self.settings = settings
        self.distillation = distillation
        self.mixing = mixing
        self.decay = decay
        self.consumers = [] if distillation is None else distillation.consumers(self.model)
        self._received: dict[str, Tensor] = {}

    def run(
        self,
        batches: Iterable[Any],
        purpose: Mapping[str, Any],
        validate: Validate | None,
        progress: bool | None,
    ) -> Progress:
        """Train up to the number of epochs, those of the checkpoint included.

        Args:
            batches: Of (inputs, labels or None) on the model's device.
            purpose: What a checkpoint must agree with, besides the settings.
            validate: Called after each epoch.
            progress: Whether to show a bar.

        Raises:
            NSSPruneError: As :func:`nss_prune.training.loop.train`.
        """
        identity = {**purpose, **self.settings.hyper_parameters(self.optimizer)}
        saved = Checkpoint(self.settings.checkpoint, self.freezing, self.optimizer, identity)
        return train(
            self, batches, self.settings, saved=saved, validate=validate, progress=progress
        )

    @contextlib.contextmanager
    def attach(self) -> Iterator[None]:
        """Within the context, what the consumers receive is kept."""
        with flags_kept(self.model), receiving(self.model, self.consumers, self._received):
            yield
        self._received.clear()

    def prepare(self, batch: tuple[Any, Tensor | None]) -> Sample:
        """Mix the samples, and ask the teacher."""
        inputs, labels = batch
        if self.mixing is not None:
            assert labels is not None
            inputs, labels = self.mixing(inputs, labels)
        if self.distillation is None:
            return Sample(inputs, labels, None, [])
        scores, received = self.distillation.targets(inputs, 0, self.consumers)
        return Sample(inputs, labels, scores, received)

    def loss(self, batch: Sample, number: int) -> Tensor:
        """That of the labels and that of the teacher, by their weights."""
        outputs = run(self.model, batch.inputs, number)
        told = self.distillation
        if told is None or batch.scores is None:
            return self._labelled(outputs, batch.labels)
        found = class_scores(outputs)
        if found.shape != batch.scores.shape:
            raise DataError(
                f"the teacher gives {tuple(batch.scores.shape)}, the model {tuple(found.shape)}; "
                "give a teacher of the same classes"
            )
        total = told.weight * soft_loss(found, batch.scores, told.temperature)
        if told.weight < 1:
            total = total + (1 - told.weight) * self._labelled(outputs, batch.labels)
        if not self.consumers:
            return total
        pairs = zip(self.consumers, batch.received, strict=True)
        alike = [similarity_loss(self._received[name], wanted) for name, wanted in pairs]
        return total + told.features * torch.stack(alike).mean()

    def _labelled(self, outputs: Any, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise DataError(
                "a batch has no labels; give (inputs, labels), or a teacher with distillation=1"
            )
        if self.mixing is not None and self.settings.loss is None:
            return cross_entropy(as_computed(class_scores(outputs)), labels)
        return mean_loss(self.settings.loss, outputs, labels)

    @torch.no_grad()
    def stepped(self) -> None:
        """Move the average."""
        if self.decay is None:
            return
        for parameter in self.model.parameters():
            if parameter.grad is None:
                continue
            state = self.optimizer.state[parameter]
            if AVERAGE in state:
                state[AVERAGE].lerp_(parameter, 1 - self.decay)
            else:
                state[AVERAGE] = parameter.detach().clone()

    @contextlib.contextmanager
    def result(self) -> Iterator[None]:
        """Within the context, the model has the averages; buffers are its own."""
        kept = [(parameter, parameter.detach().clone()) for parameter, _ in self._averages()]
        try:
            self.finish()
            yield
        finally:
            for parameter, value in kept:
                parameter.data.copy_(value)

    def finish(self) -> None:
        """Give the model the averages."""
        for parameter, average in self._averages():
            parameter.data.copy_(average)

    def _averages(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        if self.decay is None:
            return
        for parameter in self.model.parameters():
            average = self.optimizer.state.get(parameter, {}).get(AVERAGE)
            if average is not None:
                yield parameter, average
