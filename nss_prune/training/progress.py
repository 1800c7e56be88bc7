"""What a training came to so far: its epochs, the best values, when it is over."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from nss_prune.core.schema import (
    LARGEST,
    Check,
    array,
    either,
    number,
    record,
    refuse,
    table,
    whole,
)
from nss_prune.training.settings import Metrics

Values = dict[str, Tensor]


class Saved(Protocol):
    """Where a training is kept: model, optimiser, random numbers, notes and the best values."""

    def save(self, notes: Mapping[str, Any], best: Mapping[str, Tensor] | None = None) -> None:
        """Keep all that the training needs to go on."""

    def load(self, check: Check) -> tuple[dict[str, Any], Values | None] | None:
        """Put back what was kept; its notes and best values, or None where there is nothing.

        Args:
            check: Of the notes.
        """


_EVERY_EPOCH = {
    "loss": number(-sys.float_info.max, sys.float_info.max),
    "learning_rate": number(0, LARGEST),
    "seconds": number(0, LARGEST),
}


def _epochs(value: Any, where: str) -> None:
    """The metrics of epochs in order, of which a validation may add others."""
    array(table(number()), least=1)(value, where)
    for position, metrics in enumerate(value):
        known = {key: metrics[key] for key in _EVERY_EPOCH if key in metrics}
        record(_EVERY_EPOCH)(known, f"{where}[{position}]")
        if metrics.get("epoch") != position + 1:
            raise refuse(f"{where}[{position}].epoch", metrics.get("epoch"), str(position + 1))
    if len({frozenset(metrics) for metrics in value}) > 1:
        raise refuse(where, [sorted(metrics) for metrics in value], "the same metrics each epoch")


_SCALER = {  # what the state of torch's GradScaler is made of
    "scale": number(0, sys.float_info.max),
    "growth_factor": number(1, LARGEST),
    "backoff_factor": number(0, 1),
    "growth_interval": whole(),
    "_growth_tracker": whole(),
}
_NOTES = record({"history": _epochs, "scaler": either(record({}), record(_SCALER))})


@dataclass
class Progress:
    """The epochs so far.

    Attributes:
        history: Metrics of each epoch.
        best: Parameters and buffers at the best score, if they are wanted.
        scaler: State of the loss scaler.
    """

    history: list[Metrics] = field(default_factory=list)
    best: Values | None = None
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> tuple[float, ...]:
        """Mean loss of each epoch."""
        return tuple(metrics["loss"] for metrics in self.history)

    @property
    def scores(self) -> tuple[float, ...]:
        """Validation score after each epoch, if there was a validation."""
        return tuple(metrics["score"] for metrics in self.history if "score" in metrics)

    @property
    def seconds(self) -> float:
        """Time spent on training, without validation."""
        return sum(metrics["seconds"] for metrics in self.history)

    @property
    def best_epoch(self) -> int | None:
        """Position of the best score, from 0, the first of equal ones; None without scores."""
        if not self.scores:
            return None
        return self.scores.index(max(self.scores))

    def is_better(self, score: float) -> bool:
        """Whether a score is above all so far."""
        return score > max(self.scores, default=-math.inf)

    def is_over(self, patience: int | None) -> bool:
        """Whether the best score is ``patience`` epochs old."""
        if patience is None or self.best_epoch is None:
            return False
        return len(self.scores) - 1 - self.best_epoch >= patience

    def save(self, saved: Saved) -> None:
        """Keep it with what the training needs to go on."""
        saved.save({"history": self.history, "scaler": self.scaler}, self.best)

    @staticmethod
    def load(saved: Saved) -> Progress:
        """What :meth:`save` kept, model and optimiser included; a new one where there is nothing.

        Raises:
            FileFormatError, ModelMismatchError: The file is damaged or of another training.
        """
        found = saved.load(_NOTES)
        if found is None:
            return Progress()
        notes, best = found
        return Progress(notes["history"], best, notes["scaler"])
