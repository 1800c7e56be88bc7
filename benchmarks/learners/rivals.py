"""PackNet and HAT as learners."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from benchmarks.learners.course import CLASSES, Course, InOrder, Subtask, study
from benchmarks.learners.plain import Learner
from benchmarks.learners.semantic import NonCriticalNeurons
from benchmarks.rivals.hat import HardAttention
from benchmarks.rivals.packnet import PackNet
from nss_prune import Slice, profile
from nss_prune.adaptation import Freezing
from nss_prune.adaptation.incremental import IncrementalTrainer
from nss_prune.adaptation.tasks import Task

TRACED = 20  # samples of each class, where only the neurons of a model are asked for


class PackedWeights(Learner):
    """PackNet: every task keeps its largest weights, an equal share of them all.

    Args:
        tasks: How many there will be.
        again: Epochs that the kept weights train for, as a share of those of a task.
    """

    def __init__(
        self, model: nn.Module, first: Subtask, course: Course, tasks: int, again: float = 0.5
    ) -> None:
        super().__init__(model, first, course)
        self.packed = PackNet(model)
        self.left = tasks
        self.again = course.again(again)
        self._pack(first)

    @property
    def apart(self) -> bool:
        return True

    def learn(self, task: Subtask) -> None:
        super().learn(task)
        self._pack(task)

    def freezing(self, task: Subtask) -> Freezing:
        return self.packed.free(task.classes)

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        return self.packed.masked(position + 1)

    def storage(self) -> int:
        return self.packed.mask_bytes

    def _pack(self, task: Subtask) -> None:
        """Keep weights for the task just learned, and train them again."""
        kept = self.packed.keep(1 / self.left, task.classes)
        self.left -= 1
        if self.left:
            objective = self.objective(task)
            study(kept, task.data.train, None, objective, self.again, self.course.seed)


class AttendedNeurons(NonCriticalNeurons):
    """HAT: every task trains gates of the neurons, and takes those that are open in the end."""

    def __init__(self, model: nn.Module, first: Subtask, course: Course) -> None:
        Learner.__init__(self, model, first, course)
        batches = first.data.train.per_category(TRACED)
        self.groups = profile(model, InOrder(batches), progress=False).slice(1.0).groups
        critical = self._attend(first, Learner.freezing(self, first), {})
        self.trainer = IncrementalTrainer(model, critical, classes=first.classes, progress=False)

    def learn(self, task: Subtask) -> None:
        critical = self._attend(task, self.freezing(task), self._taken())
        learned = Task(f"task {len(self.tasks) + 1}", critical, task.classes, CLASSES)
        self.trainer.tasks = (*self.trainer.tasks, learned)
        self.tasks.append(task)

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        return self.trainer.task(position, masked=True)

    def _attend(self, task: Subtask, freezing: Freezing, taken: dict[str, Tensor]) -> Slice:
        """The neurons that are open once the task is learned."""
        steps = -(-len(task.data.train) // self.course.recipe.batch)
        attention = HardAttention(self.groups, taken, steps, self.course.seed)
        with attention.attached(self.model):
            study(
                freezing, task.data.train, None, self.objective(task), self.course.recipe,
                self.course.seed, attention,
            )  # fmt: skip
        return attention.slice()

    def _taken(self) -> dict[str, Tensor]:
        """Layer -> True for neurons of the tasks so far."""
        slices = [task.slice.kept for task in self.trainer.tasks]
        return {name: torch.stack([kept[name] for kept in slices]).any(0) for name in slices[0]}
