"""Which neurons and weights a model needs for the task that it has just learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from nss_prune.adaptation.answers import Answers, answers, loss_between
from nss_prune.adaptation.datasets import Data, on_device_of, parts, placed
from nss_prune.adaptation.protection import all_needed_entries, needed_entries
from nss_prune.adaptation.task_weights import prune_task_weights
from nss_prune.adaptation.tasks import Task
from nss_prune.core.classifier import outputs_of
from nss_prune.core.processes import agreed
from nss_prune.errors import ArgumentError
from nss_prune.profiling.accumulation import Loss
from nss_prune.profiling.run import profile
from nss_prune.profiling.selection import check_theta
from nss_prune.unstructured.allocation import Allocation as Allocation
from nss_prune.unstructured.allocation import find_method

THETAS = (0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5)
"""What theta="auto" tries, in this order."""

HELD_OUT = 0.2  # of a task's data: it chooses θ, the rest is profiled
OF_ENTROPY = 0.05  # by as much outputs may diverge that are unsure anyway


@dataclass(frozen=True)
class TaskFinder:
    """Finds the critical neurons, and the best weights, of a task.

    Attributes:
        theta, tolerance, divergence, keep, keep_weights, method, seed, progress, profile_arguments:
            As :class:`nss_prune.IncrementalTrainer` takes them.

    Raises:
        ArgumentError: One is outside what it may be.
    """

    theta: float | Literal["auto"] = "auto"
    tolerance: float = 0.2
    divergence: float = 5e-4
    keep: float | None = None
    keep_weights: float | None = None
    method: str | Allocation = "lamp"
    seed: int = 0
    progress: bool | None = None
    profile_arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ArgumentError(f"tolerance is {self.tolerance}; give 0 or more percentage points")
        if not self.divergence > 0:
            raise ArgumentError(f"divergence is {self.divergence}; give more than 0 nats a sample")
        if self.keep is not None and not (0 < self.keep <= 1 and self.theta == "auto"):
            raise ArgumentError(
                f"keep is {self.keep} with theta={self.theta!r}; give a share of each layer's "
                'neurons in (0, 1], with theta="auto"'
            )
        if self.keep_weights is not None and not 0 < self.keep_weights <= 1:
            raise ArgumentError(
                f"keep_weights is {self.keep_weights}; give a share of all weights in (0, 1]"
            )
        find_method(self.method)
        if self.theta != "auto":
            check_theta(self.theta)

    @agreed()
    def find(
        self,
        model: nn.Module,
        classifier: str,
        data: Data,
        *,
        name: str,
        classes: tuple[int, ...],
        loss: Loss,
    ) -> Task:
        """The task with its critical neurons.

        Args:
            model: It has just learned the task.
            classifier: Name of the layer that makes the outputs.
            data: Batches of (inputs, labels) of the task, on any device.
            name: Of the task.
            classes: The outputs that it owns, ascending.
            loss: As :func:`nss_prune.profile` takes it.

        Raises:
            DataError: There are too few samples to hold some out, or they cannot be used.
        """
        arguments = {"loss": loss, "progress": self.progress, **self.profile_arguments}
        outputs = outputs_of(model, classifier)
        if self.theta != "auto" or self.keep is not None:
            found = profile(model, placed(model, data), **arguments)
            theta = None if self.theta == "auto" else self.theta
            return Task(name, found.slice(theta, ratio=self.keep), classes, outputs)
        held_out, profiled = parts(data, HELD_OUT, self.seed)
        found = profile(model, placed(model, profiled), **arguments)
        best = Task(name, found.slice(1.0), classes, outputs)
        held_out = on_device_of(model, held_out)
        whole = answers(model, classifier, best, held_out, masked=False)
        for theta in THETAS:
            task = Task(name, found.slice(theta), classes, outputs)
            masked = answers(model, classifier, task, held_out, masked=True)
            if not self._allows(whole, masked):
                return best
            best = task
        return best

    def prune_weights(
        self, model: nn.Module, classifier: str, task: Task, earlier: Sequence[Task]
    ) -> Task:
        """The task with the best of the weights that its neurons have, where not all are kept.

        Args:
            earlier: Tasks whose weights it shares.
        """
        if self.keep_weights is None:
            return task
        weights = prune_task_weights(
            model,
            needed_entries(task, model, classifier),
            all_needed_entries(earlier, model, classifier),
            self.keep_weights,
            method=self.method,
            classifier=classifier,
        )
        return replace(task, weights=weights)

    def _allows(self, whole: Answers, masked: Answers) -> bool:
        """Whether a mask costs no more accuracy and divergence than it may."""
        lost = loss_between(whole, masked)
        if lost.accuracy > self.tolerance / 100:
            return False
        return lost.divergence <= max(self.divergence, OF_ENTROPY * lost.entropy)
