"""How a training goes: the arguments that every trainer of the package takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
from torch import nn
from torch.optim import Optimizer

from nss_prune.core.text import described as described
from nss_prune.errors import ArgumentError

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Function of the parameters that train, wholly or in part."""

Metrics = dict[str, float]
"""What is known of an epoch: "epoch" (from 1), "loss", "learning_rate", "seconds", and with a
validation its metrics and "score", the one that ``patience`` watches."""

OnEpoch = Callable[[Metrics], object]
"""Called with the metrics of each epoch, after its checkpoint is written."""


class TrainingArguments(TypedDict, total=False):
    """The keywords of :class:`TrainingSettings`, for type checkers and editors."""

    epochs: int
    optimizer: str | Optimizer | OptimizerFactory
    learning_rate: float
    momentum: float
    weight_decay: float
    scheduler: str | None
    warmup_epochs: int
    loss: Any
    amp: torch.dtype | None
    clip_norm: float | None
    patience: int | None
    restore_best: bool | None
    checkpoint: str | os.PathLike[str] | None
    resume: bool
    on_epoch: OnEpoch | None


@dataclass(frozen=True)
class TrainingSettings:
    """The arguments of a training, checked.

    Attributes:
        epochs: Passes over the data, those of a checkpoint included.
        optimizer: A name that timm knows, an optimiser of the model's parameters, or a function
            of the list of those that train. (A fused AdamW is the fastest on a CPU.)
        learning_rate, momentum, weight_decay: For an optimiser by name; biases and norms do not
            decay.
        scheduler: A name that timm knows ("cosine", "step", "plateau", ...), stepped once an
            epoch, or None for a constant rate.
        warmup_epochs: Of these, in which the rate of a scheduler rises to its full value.
        loss: Function of (outputs, labels), one value for each sample or their mean. What None
            stands for, and which names there are, is said where the argument is taken.
        amp: torch.bfloat16 or torch.float16 for mixed precision.
        clip_norm: Largest norm of the gradient of all that trains.
        patience: Epochs without a better score after which the training stops; needs a validation.
        restore_best: Whether the model has the values of its best score in the end, not its last
            ones; by default where there is ``patience``.
        checkpoint: File to write after every epoch (safetensors).
        resume: Whether to go on from the checkpoint where it is there. One of other
            hyper-parameters is refused.
        on_epoch: Called with the metrics of each epoch.

    Raises:
        ArgumentError: One is outside what it may be.
    """

    epochs: int = 10
    optimizer: str | Optimizer | OptimizerFactory = "adamw"
    learning_rate: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    scheduler: str | None = None
    warmup_epochs: int = 0
    loss: Any = None
    amp: torch.dtype | None = None
    clip_norm: float | None = None
    patience: int | None = None
    restore_best: bool | None = None
    checkpoint: str | os.PathLike[str] | None = None
    resume: bool = False
    on_epoch: OnEpoch | None = None

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("patience", 1), ("warmup_epochs", 0)):
            value = getattr(self, name)
            if name == "patience" and value is None:
                continue
            if not isinstance(value, int) or value < least:
                raise ArgumentError(f"{name} is {value!r}; give {least} or more")
        if self.warmup_epochs and self.scheduler is None:
            raise ArgumentError(
                f"warmup_epochs is {self.warmup_epochs} without a scheduler; give one, such as "
                "scheduler='cosine'"
            )
        if self.amp not in (None, torch.bfloat16, torch.float16):
            raise ArgumentError(f"amp is {self.amp!r}; use torch.bfloat16, torch.float16 or None")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ArgumentError(f"clip_norm is {self.clip_norm!r}; give a number above 0, or None")
        if self.resume and self.checkpoint is None:
            raise ArgumentError("resume=True needs the file to go on from; give checkpoint=")
        for name in ("loss", "on_epoch"):
            value = getattr(self, name)
            if value is not None and not callable(value) and not isinstance(value, str):
                raise ArgumentError(f"{name} is {value!r}; give a function, or None")

    @staticmethod
    def of(arguments: Mapping[str, Any], **defaults: Any) -> TrainingSettings:
        """The settings that some keywords ask for.

        Raises:
            ArgumentError: There is no such keyword, or it is outside what it may be.
        """
        known = [field.name for field in fields(TrainingSettings)]
        strange = [name for name in arguments if name not in known]
        if strange:
            raise ArgumentError(
                f"there is no argument {', '.join(map(repr, strange))}; a training takes "
                f"{', '.join(known)}"
            )
        return TrainingSettings(**{**defaults, **arguments})

    @property
    def keeps_best(self) -> bool:
        """Whether the values of the best score come back in the end."""
        return self.patience is not None if self.restore_best is None else self.restore_best

    def hyper_parameters(self, optimizer: Optimizer) -> dict[str, Any]:
        """What a checkpoint must agree with, as JSON can hold it.

        The number of epochs counts where a schedule depends on it: a training without one may be
        prolonged.

        Args:
            optimizer: The one that trains.
        """
        found = {"optimizer": type(optimizer).__name__, **_numbers(optimizer.defaults)}
        # timm gives the decay to a group of its own, and none to the others.
        decays = [group.get("weight_decay", 0) for group in optimizer.param_groups]
        found["weight_decay"] = max(decays)
        found |= {
            name: described(getattr(self, name))
            for name in ("scheduler", "loss", "amp", "clip_norm")
        }
        if self.scheduler is not None:
            found |= {"epochs": self.epochs, "warmup_epochs": self.warmup_epochs}
        return found

    def check_validation(self, validation: Any) -> None:
        """Refuse patience, or best values, without something to watch.

        Raises:
            ArgumentError: Says what to give.
        """
        if validation is None and (self.patience is not None or self.restore_best):
            name = "restore_best" if self.patience is None else "patience"
            raise ArgumentError(f"{name} needs something to watch; give fit(data, validation)")


def _numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an optimiser's options that say what it computes, not how."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = value
        elif isinstance(value, (tuple, list)):
            found[name] = [described(item) for item in value]
    return found
