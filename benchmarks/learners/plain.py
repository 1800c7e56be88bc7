"""Learners that train the whole network, nothing, or the layers that DeepArc finds redundant."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.common.data import Split
from benchmarks.common.settings import SIMILAR
from benchmarks.learners.course import Course, InOrder, Subtask, drawn, study
from nss_prune.adaptation import Freezing
from nss_prune.adaptation.training import Objective, TaskLoss
from nss_prune.deeparc import DeepArc
from nss_prune.errors import NothingToPruneError


class Learner:
    """Learns task after task; by itself it trains the whole network, and replays.

    Args:
        model: Trained on the first task; it is changed.
        first: That task.
        course: How the others are learned.
        replay: Share of the earlier tasks' data that is kept and replayed.
    """

    def __init__(
        self, model: nn.Module, first: Subtask, course: Course, replay: float = 0.0
    ) -> None:
        self.model = model
        self.course = course
        self.replay = replay
        self.tasks = [first]

    @property
    def apart(self) -> bool:
        """Whether tasks do not compete: which one a sample belongs to is always asked first."""
        return False

    def learn(self, task: Subtask) -> None:
        study(
            self.freezing(task), task.data.train, self.replayed(), self.objective(task),
            self.course.recipe, self.course.seed,
        )  # fmt: skip
        self.tasks.append(task)

    def freezing(self, task: Subtask) -> Freezing:
        """What trains for the next task."""
        every = {
            name: torch.ones_like(parameter, dtype=torch.bool)
            for name, parameter in self.model.named_parameters()
        }
        return Freezing(self.model, every)

    def objective(self, task: Subtask) -> Objective:
        earlier = tuple(c for known in self.tasks for c in known.classes)
        if self.course.loss == "all" or (self.course.loss == "method" and not self.apart):
            return Objective(*[TaskLoss(tuple(sorted({*earlier, *task.classes})))] * 2)
        return Objective(TaskLoss(task.classes), TaskLoss(earlier))

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        """The model as it answers for a task."""
        return nullcontext(self.model)

    def replayed(self) -> Split | None:
        """What is kept of the tasks so far."""
        if self.replay == 0:
            return None
        parts = [drawn(task.data.train, self.replay, self.course.seed) for task in self.tasks]
        pixels, labels = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "labels")
        )
        return replace(parts[0], pixels=pixels, labels=labels)

    def storage(self) -> int:
        """Bytes for the first task, beside the model: its samples, a byte for each label."""
        if self.replay == 0:
            return 0
        kept = drawn(self.tasks[0].data.train, self.replay, self.course.seed)
        return kept.pixels.nbytes + len(kept)


class Original(Learner):
    """Learns nothing more."""

    def learn(self, task: Subtask) -> None:
        self.tasks.append(task)


class RedundantLayers(Learner):
    """Trains the layers that DeepArc finds redundant for the first task, and nothing else."""

    def freezing(self, task: Subtask) -> Freezing:
        first = self.tasks[0].data.train.per_category(self.course.profiled)
        found = DeepArc(self.model, InOrder(first), SIMILAR, progress=False)
        if not found.redundant:
            similar = max(found.similarity.values())
            raise NothingToPruneError(
                f"no layer is redundant: similarities reach {similar:.3f}, not {SIMILAR}"
            )
        redundant = {name: ~others for name, others in found.trainable().items()}
        norms = found.freezing().frozen_statistics  # these belong to redundant layers
        others = {
            name: torch.ones_like(module.running_mean, dtype=torch.bool)
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "running_mean", None), Tensor) and name not in norms
        }
        return Freezing(self.model, redundant, others)
