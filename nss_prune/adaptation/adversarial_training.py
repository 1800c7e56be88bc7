"""Steps on samples and their adversaries: L = CE(x) + CE(x')."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nss_prune.adaptation.adversarial_loss import AdversarialLoss, AttackedBatch
from nss_prune.adaptation.checkpoint import Checkpoint
from nss_prune.adaptation.datasets import Data
from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.packing import pack_small
from nss_prune.adaptation.partial_gradients import BlockTraining, extract_blocks
from nss_prune.adaptation.training import make_optimizer
from nss_prune.training.learner import Learner
from nss_prune.training.loop import Validate, train
from nss_prune.training.progress import Progress as Progress
from nss_prune.training.settings import TrainingSettings, described


class AdversarialTraining(Learner):
    """Trains what a freezing leaves to train, on samples and their adversaries.

    Args:
        freezing: What trains, of which model.
        settings: Of the training. An optimiser that is made here, by name or by a function, gets
            parameters of its own in place of those that train in part.
        objective: What is minimised.
    """

    def __init__(
        self, freezing: Freezing, settings: TrainingSettings, objective: AdversarialLoss
    ) -> None:
        super().__init__(freezing.model, make_optimizer(freezing, settings))
        self.freezing = freezing
        self.settings = settings
        self.objective = objective
        # Not in an optimiser made elsewhere, whose parameters may be known there.
        is_own = not isinstance(settings.optimizer, Optimizer)
        blocks = extract_blocks(freezing, self.optimizer) if is_own else {}
        reads_gradients = settings.clip_norm is not None or settings.amp == torch.float16
        packs = pack_small(freezing, self.optimizer) if is_own and not reads_gradients else ()
        self.blocks = BlockTraining(
            freezing, self.optimizer, blocks, zero_gradients=reads_gradients, packs=packs
        )

    def run(
        self, batches: Data, validate: Validate | None = None, progress: bool | None = None
    ) -> Progress:
        """Train up to the number of epochs, those of the checkpoint included.

        Args:
            batches: On the model's device.
            validate: Called after each epoch.
            progress: Whether to show a bar; by default in a terminal.

        Raises:
            NSSPruneError: As :func:`nss_prune.training.loop.train`.
        """
        # Frozen entries are compared besides: the same number of others are the same ones.
        purpose = {
            "entries in blocks": self.blocks.size,
            "attack": described(self.objective.attack),
            "adversaries": "fixed" if self.objective.fixed else "fresh",
            **self.settings.hyper_parameters(self.optimizer),
        }
        checkpoint = Checkpoint(self.settings.checkpoint, self.freezing, self.optimizer, purpose)
        return train(
            self, batches, self.settings, saved=checkpoint, validate=validate, progress=progress
        )

    def attach(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, what is frozen keeps its bits."""
        return self.blocks.attach()

    def begin(self) -> None:
        """Take the blocks from the model."""
        self.blocks.read()

    def gradients(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, layers compute the gradients of their blocks only."""
        return self.blocks.block_gradients()

    def parameters(self) -> Iterable[nn.Parameter]:
        """The model's parameters, or their blocks."""
        return self.blocks.parameters()

    def prepare(self, batch: tuple[Any, Tensor]) -> AttackedBatch:
        """Inputs, adversaries if there is an attack, and labels."""
        return self.objective.prepare(batch)

    def loss(self, batch: AttackedBatch, number: int) -> Tensor:
        """The mean over the samples, plus that over their adversaries."""
        return self.objective(batch, number)
