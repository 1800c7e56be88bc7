"""The metrics of a model on validation batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nss_prune.adaptation.datasets import Data, on_device_of, with_labels
from nss_prune.core.accuracy import count_right
from nss_prune.core.models import device_of, evaluation, run
from nss_prune.core.outputs import class_scores
from nss_prune.core.processes import total
from nss_prune.errors import ArgumentError, DataError


class Metric(Protocol):
    """What torchmetrics calls a metric."""

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add a batch."""

    def compute(self) -> Any:
        """The value over all batches."""

    def reset(self) -> None:
        """Forget all batches."""


Validation = Data | Callable[[nn.Module], "float | Mapping[str, float]"]
"""Batches of (inputs, labels), or a function of the model that gives a score or metrics."""


@dataclass(frozen=True)
class Validating:
    """Measures a model.

    Attributes:
        model: In any mode; it is measured in evaluation mode, and left as found.
        validation: Batches, or a function of the model.
        metrics: By name, besides "accuracy": of torchmetrics, on the model's device.
        monitor: Name of the metric that is the score, larger for better; "-name" where less is
            better.
    """

    model: nn.Module
    validation: Validation
    metrics: Mapping[str, Metric]
    monitor: str = "accuracy"

    @staticmethod
    def of(
        model: nn.Module,
        validation: Validation | None,
        metrics: Mapping[str, Metric],
        monitor: str,
    ) -> Validating | None:
        """What measures a model; None without a validation."""
        return None if validation is None else Validating(model, validation, metrics, monitor)

    def __call__(self) -> dict[str, float]:
        """The metrics, "score" among them.

        Raises:
            ArgumentError: There is no metric of the name to monitor.
            DataError: There are no samples, or they cannot be used.
        """
        found = self._measured()
        if "score" in found:
            return found
        name = self.monitor.removeprefix("-")
        if name not in found:
            raise ArgumentError(f"monitor is {self.monitor!r}; there are {', '.join(found)}")
        return {**found, "score": -found[name] if self.monitor.startswith("-") else found[name]}

    def _measured(self) -> dict[str, float]:
        if not callable(self.validation):
            return self._on_batches(self.validation)
        found = self.validation(self.model)
        if isinstance(found, Mapping):
            return {name: float(value) for name, value in found.items()}
        return {"score": float(found)}

    @torch.no_grad()
    def _on_batches(self, data: Data) -> dict[str, float]:
        right = count = 0
        for metric in self.metrics.values():
            metric.reset()
        batches = on_device_of(self.model, data, with_labels)
        for number, (inputs, labels) in enumerate(batches):
            with evaluation(self.model):
                scores = class_scores(run(self.model, inputs, number))
            if scores.shape[:1] + scores.shape[2:] == labels.shape:
                more = count_right([(scores.argmax(1), labels)])
                right, count = right + more[0], count + more[1]
            for metric in self.metrics.values():
                metric.update(scores, labels)
        sums = total([right, count], device_of(self.model))
        found = {"accuracy": sums[0] / sums[1]} if sums[1] else {}
        if not found and not self.metrics:
            raise DataError(
                "the validation has no samples of one class each; give batches of (inputs, "
                "labels), or metrics="
            )
        return {**found, **{name: float(m.compute()) for name, m in self.metrics.items()}}
