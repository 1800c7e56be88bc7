"""One epoch on samples and their adversaries: L = CE(x) + CE(x')."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nss_prune.adaptation.attacks import Attack, attacked
from nss_prune.adaptation.datasets import Data
from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.partial_gradients import BlockTraining, extract_blocks
from nss_prune.adaptation.training import Loss, mean_loss, one_pass
from nss_prune.core.models import device_of, run
from nss_prune.core.processes import average_gradients


class AdversarialTraining:
    """Trains what a freezing leaves to train, on samples and their adversaries.

    Args:
        freezing: What trains, of which model.
        optimizer: Of the model's parameters.
        in_blocks: Whether the optimiser may get parameters of its own in place of those of which
            only a block of rows and columns trains.
        attack: Makes the adversaries; None to learn the samples as they are.
        fixed: Whether the batches bring their adversaries, ((inputs, adversaries), labels).
        loss: As :class:`nss_prune.ReadaptTrainer` takes it, as the others.
    """

    def __init__(
        self,
        freezing: Freezing,
        optimizer: Optimizer,
        *,
        in_blocks: bool,
        attack: Attack | None,
        fixed: bool,
        loss: Loss | None = None,
        amp: torch.dtype | None = None,
        clip_norm: float | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model = freezing.model
        self.attack = attack
        self.fixed = fixed
        self.loss = loss
        self.amp = amp
        self.clip_norm = clip_norm
        self.progress = progress
        blocks = extract_blocks(freezing, optimizer) if in_blocks else {}
        reads_gradients = clip_norm is not None or amp == torch.float16
        self.blocks = BlockTraining(freezing, optimizer, blocks, zero_gradients=reads_gradients)
        self._scaler: Any = None

    @contextlib.contextmanager
    def attach(self) -> Iterator[None]:
        """Within the context, :meth:`epoch` trains; what is frozen keeps its bits."""
        self._scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            device_of(self.model).type, enabled=self.amp == torch.float16
        )
        with self.blocks.attach():
            yield

    def epoch(self, batches: Data, number: int, title: str) -> float:
        """Mean loss of one pass over the data, within :meth:`attach`.

        Args:
            batches: On the model's device.
            number: Of the epoch, for samplers that draw by it.
            title: For the progress bar and messages.

        Raises:
            DataError: There is no batch, or the model or the attack refuses one.
            NumericalError: The loss or the weights became NaN or infinite.
        """
        # A checkpoint, the other processes or the validation may have changed the model.
        self.blocks.read()
        sampler = getattr(getattr(batches, "data", None), "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(number)
        return one_pass(self.model, batches, self._step, title, self.progress)

    def _step(self, batch: Any, number: int) -> Tensor:
        """One step of the optimiser; the loss, detached."""
        samples = self._attacked(batch)
        optimizer = self.blocks.optimizer
        optimizer.zero_grad()
        with self.blocks.block_gradients():
            loss = self._batch_loss(*samples, number)
            self._scaler.scale(loss).backward()
        average_gradients(self.blocks.parameters())
        if self.clip_norm is not None:
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.blocks.parameters(), self.clip_norm)
        self._scaler.step(optimizer)
        self._scaler.update()
        return loss.detach()

    def _attacked(self, batch: tuple[Any, Tensor]) -> tuple[Any, Tensor | None, Tensor]:
        """Inputs, adversaries if there is an attack, and labels."""
        inputs, labels = batch
        if self.attack is None:
            return inputs, None, labels
        if self.fixed:
            return *inputs, labels
        return inputs, attacked(self.attack, self.model, inputs, labels), labels

    def _batch_loss(
        self, inputs: Any, adversaries: Tensor | None, labels: Tensor, number: int
    ) -> Tensor:
        device = device_of(self.model)
        with torch.autocast(device.type, dtype=self.amp, enabled=self.amp is not None):
            if adversaries is None:
                return mean_loss(self.loss, run(self.model, inputs, number), labels)
            # Together, so that batch norms see and record both as one.
            outputs = run(self.model, torch.cat([inputs, adversaries]), number)
            return 2 * mean_loss(self.loss, outputs, torch.cat([labels, labels]))
