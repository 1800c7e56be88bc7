"""NeuSemSlice: learners that train what is not critical to earlier tasks."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from torch import nn

from benchmarks.learners.course import Course, InOrder, Subtask, study
from benchmarks.learners.plain import Learner
from nss_prune.adaptation import Freezing
from nss_prune.adaptation.incremental import IncrementalTrainer

THIN = 0.5  # of an equal share of the weights, for a task of neusemslice-lamp


class NonCriticalNeurons(Learner):
    """NeuSemSlice: trains what is not critical to earlier tasks."""

    def __init__(
        self,
        model: nn.Module,
        first: Subtask,
        course: Course,
        replay: float = 0.0,
        share: float | None = None,
        weights: float | None = None,
    ) -> None:
        super().__init__(model, first, course, replay)
        self.trainer = IncrementalTrainer(
            model, data=self._profiled(first), classes=first.classes, keep=share,
            keep_weights=weights, progress=False,
        )  # fmt: skip

    @property
    def apart(self) -> bool:
        return self.replay == 0

    def learn(self, task: Subtask) -> None:
        super().learn(task)
        self.trainer.add(self._profiled(task))

    def freezing(self, task: Subtask) -> Freezing:
        inputs, _ = next(task.data.train.batches(8))
        return self.trainer.freezing(inputs)

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        return self.trainer.task(position)

    def storage(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task"
            replace(self.trainer.tasks[0], features=None).save(path)  # a task is given
            return super().storage() + path.stat().st_size

    def _profiled(self, task: Subtask) -> InOrder:
        return InOrder(task.data.train.per_category(self.course.profiled))


class SettledNeurons(NonCriticalNeurons):
    """NeuSemSlice whose slices are small, and trained until they do alone.

    Args:
        tasks: How many there will be.
        again: Epochs of that training, as a share of those of a task.
        thin: Whether a task keeps more neurons, and of their weights a part.
    """

    def __init__(
        self,
        model: nn.Module,
        first: Subtask,
        course: Course,
        tasks: int,
        again: float = 0.5,
        *,
        thin: bool = False,
    ) -> None:
        self.count = tasks
        # A share of neurons makes its square of the parameters.
        self.power = 0.25 if thin else 0.5
        weights = THIN / tasks if thin else None
        super().__init__(model, first, course, share=self._share(1), weights=weights)
        self.again = course.again(again)
        self._settle(first)

    def learn(self, task: Subtask) -> None:
        self.trainer.keep = self._share(len(self.tasks) + 1)
        super().learn(task)
        if len(self.tasks) < self.count:
            self._settle(task)

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        settled = position < self.count - 1
        return self.trainer.task(position, masked=True if settled else None)

    def _share(self, number: int) -> float:
        """Of each layer's neurons for a task; it reads those of the tasks before it."""
        return float((number / self.count) ** self.power)

    def _settle(self, task: Subtask) -> None:
        inputs, _ = next(task.data.train.batches(8))
        freezing = self.trainer.masked_freezing(inputs)
        objective = self.objective(task)
        with self.trainer.tasks[-1].masked(self.model):
            study(freezing, task.data.train, None, objective, self.again, self.course.seed)
        self.trainer.update_features(self._profiled(task))
