"""timm's optimisers and schedules by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nss_prune.errors import ArgumentError
from nss_prune.training.settings import TrainingSettings

FUSED = ("adam", "adamw")
"""Optimisers to be fused where possible: else the zeros of frozen entries are slow on a CPU."""


def optimizer_by_name(model: nn.Module, name: str, options: dict[str, float]) -> Optimizer:
    """timm's optimiser of all parameters that require gradients.

    Args:
        options: "lr", "weight_decay" (from which biases and norms are exempt) and "momentum".

    Raises:
        ArgumentError: timm does not make it.
    """
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


class Schedule:
    """The learning rates of a training, set before each of its epochs.

    Args:
        settings: With the name of one of timm's, or None for constant rates.
        optimizer: Whose rates they are.

    Raises:
        ArgumentError: timm does not make it.
    """

    def __init__(self, settings: TrainingSettings, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._scheduler = _timm_scheduler(settings, optimizer)

    def begin(self, epoch: int, scores: Sequence[float]) -> None:
        """Set the rates of an epoch, counted from 0, after those scores."""
        if self._scheduler is not None:
            self._scheduler.step(epoch, scores[epoch - 1] if 0 < epoch <= len(scores) else None)

    def resume(self, epochs: int, scores: Sequence[float]) -> None:
        """Go through the epochs that a checkpoint has behind it: some schedules remember them."""
        if self._scheduler is None:
            return
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
        for epoch in range(epochs):
            self.begin(epoch, scores)


def _timm_scheduler(settings: TrainingSettings, optimizer: Optimizer) -> Any:
    name = settings.scheduler
    if name is None:
        return None
    from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]  # it takes long

    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=name,
            num_epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            warmup_prefix=False,
        )
    except Exception as error:
        raise ArgumentError(f"timm makes no scheduler {name!r}: {error}") from error
    if scheduler is None:
        raise ArgumentError(f"timm has no scheduler {name!r}; use 'cosine', 'step', ..., or None")
    return scheduler
