"""The training loop: epochs of steps, validation, the best values, checkpoints."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nss_prune.core.models import device_of
from nss_prune.core.processes import (
    agreed,
    average_gradients,
    copy_from_first,
    gathered,
    is_first,
    processes,
    total,
)
from nss_prune.core.undo import copied, put_back
from nss_prune.errors import DataError, NumericalError
from nss_prune.training.learner import Learner
from nss_prune.training.progress import Progress, Saved
from nss_prune.training.schedulers import Schedule
from nss_prune.training.settings import TrainingSettings

LOGGER = logging.getLogger("nss_prune")

Validate = Callable[[], Mapping[str, float]]
"""Gives the metrics of the model as it is, "score" among them: larger is better."""


@agreed()
def train(
    learner: Learner,
    batches: Iterable[Any],
    settings: TrainingSettings,
    *,
    saved: Saved,
    validate: Validate | None = None,
    progress: bool | None = None,
) -> Progress:
    """Train up to a number of epochs, those of a checkpoint included.

    Under torchrun, gradients are averaged over the processes, each with its own part of the data:
    in a step, over those that still have a batch. All end with the same model, bit for bit, or
    raise what one of them raised.

    Args:
        learner: What trains, and the loss of a batch.
        batches: On the model's device; they can be iterated repeatedly.
        settings: How.
        saved: The checkpoint.
        validate: Called after each epoch.
        progress: Whether to show a bar; by default in a terminal.

    Raises:
        ArgumentError: timm does not make the scheduler.
        DataError: There is no batch, or the model refuses one.
        FileFormatError, ModelMismatchError: The checkpoint is damaged or of another training.
        NumericalError: The loss or the weights became NaN or infinite.
    """
    schedule = Schedule(settings, learner.optimizer)
    steps = Steps(learner, settings, progress)
    with learner.attach():
        done = Progress.load(saved) if settings.resume else Progress()
        steps.load(done)
        schedule.resume(len(done.history), done.scores)
        while len(done.history) < settings.epochs and not done.is_over(settings.patience):
            schedule.begin(len(done.history), done.scores)
            _epoch(steps, batches, done, validate)
            done.save(saved)
            _announce(done, settings)
        if done.best is None:
            learner.finish()
        else:
            put_back(learner.model, done.best)
    learner.optimizer.zero_grad()
    return done


def _epoch(steps: Steps, batches: Iterable[Any], done: Progress, validate: Validate | None) -> None:
    """One more epoch, its validation, and the model's values where it is the best."""
    learner, settings = steps.learner, steps.settings
    number = len(done.history) + 1
    rate = learner.optimizer.param_groups[0]["lr"]
    begin = time.perf_counter()
    _draw_by_epoch(batches, number - 1)
    loss = steps.take(batches, f"epoch {number}/{settings.epochs}")
    seconds = time.perf_counter() - begin
    metrics = {"epoch": number, "loss": loss, "learning_rate": rate, "seconds": seconds}
    copy_from_first(learner.model)
    if validate is not None:
        with learner.result():
            metrics |= {name: float(value) for name, value in validate().items()}
            if settings.keeps_best and done.is_better(metrics["score"]):
                done.best = copied(learner.model)
    done.history.append(metrics)
    done.scaler = steps.scaler.state_dict()


def _draw_by_epoch(batches: Any, epoch: int) -> None:
    """Let a sampler that draws by the number of the epoch know it."""
    while hasattr(batches, "data"):
        batches = batches.data
    sampler = getattr(batches, "sampler", None)
    if sampler is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)


def _announce(done: Progress, settings: TrainingSettings) -> None:
    """Log the last epoch, and tell who wants to know it."""
    metrics = done.history[-1]
    if is_first():
        hidden = ("epoch", "seconds", "score" if len(metrics) > 5 else "")
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name not in hidden]
        left = done.seconds / len(done.history) * (settings.epochs - len(done.history))
        LOGGER.info(
            "epoch %d/%d: %s; %.1f s, at most %.0f s left",
            metrics["epoch"], settings.epochs, ", ".join(shown), metrics["seconds"], left,
        )  # fmt: skip
    if settings.on_epoch is not None:
        settings.on_epoch(dict(metrics))


class Steps:
    """The steps of the optimiser in one epoch after the other.

    Args:
        learner: What trains, and the loss of a batch.
        settings: With mixed precision and clipping.
        progress: Whether to show a bar; by default in a terminal.
    """

    def __init__(
        self, learner: Learner, settings: TrainingSettings, progress: bool | None = None
    ) -> None:
        self.learner = learner
        self.settings = settings
        self.hidden = not is_first() or (None if progress is None else not progress)
        self.device = device_of(learner.model).type
        self.scaler: Any = torch.amp.GradScaler(  # type: ignore[attr-defined]
            self.device, enabled=settings.amp == torch.float16
        )

    def load(self, done: Progress) -> None:
        """Scale the loss as before."""
        if done.scaler:
            self.scaler.load_state_dict(done.scaler)

    def take(self, batches: Iterable[Any], title: str) -> float:
        """Train on every batch once.

        Args:
            title: For the progress bar and messages.

        Returns:
            The mean loss, over all processes.

        Raises:
            DataError: There is no batch.
            NumericalError: The loss, or a parameter afterwards, is NaN or infinite.
        """
        losses: list[Tensor] = []
        self.learner.begin()
        self.learner.model.train()
        with tqdm(batches, title, unit="batch", leave=False, disable=self.hidden) as bar:
            for number, batch in enumerate(_until_all_end(bar)):
                loss = self._step(batch, number)
                if loss is None:
                    break
                losses += [] if batch is None else [loss]
        sums = [float(sum(losses)), len(losses)]
        summed, steps = total(sums, device_of(self.learner.model))
        if not steps:
            raise DataError("the data has no batch; give batches that can be iterated repeatedly")
        mean = summed / steps
        check_finite(self.learner.model, mean, title)
        return mean

    def _step(self, batch: Any, number: int) -> Tensor | None:
        """One step of the optimiser; the loss, detached.

        Args:
            batch: None where this process has no more; None is returned where no process has.
        """
        learner = self.learner
        loss = self._backward(batch, number)
        sharing = sum(gathered(batch is not None))
        if not sharing:
            return None
        average_gradients(learner.parameters(), sharing)
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(learner.optimizer)
            nn.utils.clip_grad_norm_(learner.parameters(), self.settings.clip_norm)
        self.scaler.step(learner.optimizer)
        self.scaler.update()
        learner.stepped()
        return loss

    def _backward(self, batch: Any, number: int) -> Tensor:
        """The loss of a batch, detached, its gradients taken; zero where there is no batch."""
        learner, amp = self.learner, self.settings.amp
        prepared = None if batch is None else learner.prepare(batch)
        learner.optimizer.zero_grad()
        if batch is None:
            loss = torch.zeros((), device=device_of(learner.model))
            self.scaler.scale(loss)  # which sets it up
            return loss
        with learner.gradients():
            with torch.autocast(self.device, dtype=amp, enabled=amp is not None):
                loss = learner.loss(prepared, number)
            self.scaler.scale(loss).backward()
        return loss.detach()


def _until_all_end(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches of this process; then None, where another may have more."""
    return batches if processes() == 1 else itertools.chain(batches, itertools.repeat(None))


def check_finite(model: nn.Module, loss: float, title: str) -> None:
    """Refuse a loss or weights that are not finite.

    Raises:
        NumericalError: Names the epoch.
    """
    finite = [parameter.isfinite().all() for parameter in model.parameters()]
    if math.isfinite(loss) and bool(torch.stack(finite).all()):
        return
    what = "weights are not finite" if math.isfinite(loss) else f"the mean loss is {loss}"
    raise NumericalError(
        f"{title}: {what}; use a smaller learning rate, and check the data for NaN"
    )
