"""The loss of samples and their adversaries: L = CE(x) + CE(x')."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nss_prune.adaptation.attacks import Attack, attacked
from nss_prune.core.models import run
from nss_prune.profiling.accumulation import Loss
from nss_prune.training.evaluation import mean_loss

AttackedBatch: TypeAlias = "tuple[Any, Tensor | None, Tensor]"
"""Inputs, adversaries if there is an attack, and labels."""


@dataclass(frozen=True)
class AdversarialLoss:
    """The loss of samples plus that of their adversaries.

    Attributes:
        model: Of which it is.
        attack: Makes the adversaries; None to learn the samples as they are.
        fixed: Whether the batches bring their adversaries, ((inputs, adversaries), labels).
        loss: Of outputs and labels; cross entropy by default.
    """

    model: nn.Module
    attack: Attack | None
    fixed: bool
    loss: Loss | None = None

    def prepare(self, batch: tuple[Any, Tensor]) -> AttackedBatch:
        """What the loss is of, made of a batch on the model's device."""
        inputs, labels = batch
        if self.attack is None:
            return inputs, None, labels
        if self.fixed:
            return *inputs, labels
        return inputs, attacked(self.attack, self.model, inputs, labels), labels

    def __call__(self, batch: AttackedBatch, number: int) -> Tensor:
        """The mean over the samples, plus that over their adversaries.

        Args:
            number: Of the batch, for messages.
        """
        inputs, adversaries, labels = batch
        if adversaries is None:
            return mean_loss(self.loss, run(self.model, inputs, number), labels)
        # Together, so that batch norms see and record both as one.
        outputs = run(self.model, torch.cat([inputs, adversaries]), number)
        return 2 * mean_loss(self.loss, outputs, torch.cat([labels, labels]))

    def of_batch(self, batch: tuple[Any, Tensor], number: int) -> tuple[Tensor, int]:
        """The same of a batch as it comes, with its number of samples."""
        prepared = self.prepare(batch)
        return self(prepared, number), len(prepared[2])
