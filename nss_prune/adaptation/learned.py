"""The tasks that a model has learned: inference for each, and what may train besides them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from nss_prune.adaptation.accuracies import AccuracyMatrix
from nss_prune.adaptation.freezing import Freezing
from nss_prune.adaptation.inferred import InferredTask
from nss_prune.adaptation.protection import (
    all_needed_entries,
    free_neurons,
    isolated_slices,
    needed_channels,
    needed_entries,
)
from nss_prune.adaptation.task_weights import check_weights
from nss_prune.adaptation.tasks import Task
from nss_prune.adaptation.validation import Validation, accuracy_of_task
from nss_prune.core.classifier import find_classifier, outputs_of
from nss_prune.core.models import submodule, uncompiled
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError, NothingToPruneError
from nss_prune.graph.axes import check_fits
from nss_prune.graph.slices import Slice


class LearnedTasks(InferredTask):
    """A model and the tasks it has learned, in their order.

    Args:
        model: It has learned them.
        head: The classifier, the layer that makes the outputs, or its name; by default the last
            Linear layer, or the last convolution where there is none.
        tasks: At least one.

    Attributes:
        accuracies: Of all tasks with validation batches after each one learned.

    Raises:
        ArgumentError: A task slices the layer that makes the outputs.
        ModelMismatchError: A task is of another model.
    """

    def __init__(
        self, model: nn.Module, head: nn.Module | str | None, tasks: Sequence[Task]
    ) -> None:
        self.model = model = uncompiled(model)
        self.head = find_classifier(model, head)
        self.tasks = tuple(tasks)
        for task in self.tasks:
            self._check(task)
        self.accuracies = AccuracyMatrix()
        self._validations: dict[str, Validation | None] = {}

    @contextlib.contextmanager
    def task(self, task: int | str = -1, *, masked: bool | None = None) -> Iterator[nn.Module]:
        """Inference for one task: its neurons, evaluation mode, −∞ for classes it does not own.

        Args:
            task: Position or name.
            masked: Only its critical neurons. By default for all but the last of several tasks,
                which uses the whole network unless it was fine-tuned under its mask.

        Raises:
            ArgumentError: There is no such task.
        """
        position = self._position(task)
        found = self.tasks[position]
        whole = 0 < position == len(self.tasks) - 1 and not found.finetuned
        with found.inference(self.model, self.head, masked=not whole if masked is None else masked):
            yield self.model

    def task_a(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Inference for the first task, with its mask."""
        return self.task(0)

    def task_b(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Inference for the second task: the whole network, its mask once there is a third.

        A task that was fine-tuned under its mask uses it from then on.

        Raises:
            ArgumentError: It is not learned yet.
        """
        return self.task(1)

    @property
    def free(self) -> dict[str, int]:
        """Layer -> neurons that are critical to none of the tasks."""
        return free_neurons([task.slice for task in self.tasks])

    def freezing(self, inputs: Any) -> Freezing:
        """What may train for the next task, for a training loop of your own.

        ::

            with trainer.freezing(inputs).attach(optimizer):
                ...
            trainer.add(task_b)

        Args:
            inputs: Of one call of the model, on its device.

        Raises:
            NothingToPruneError: No neuron is free.
            ModelMismatchError: A slice does not cut a path between layers.
        """
        isolated = isolated_slices(self.tasks, self.model, inputs)
        frozen = self._frozen(self.tasks, isolated)
        partial = set.intersection(*(set(task.weights) for task in self.tasks))
        has_free_weights = any(not frozen[name].all() for name in partial)
        if not has_free_weights and not any(self._free_isolated(isolated)):
            raise NothingToPruneError(
                f"no layer has a neuron that is free for another task: {len(self.tasks)} task(s) "
                "take them all; give earlier tasks smaller slices (a smaller theta or a larger "
                "tolerance) or a share of the weights, or take a wider model"
            )
        trainable = {name: ~entries for name, entries in frozen.items()}
        return Freezing(self.model, trainable, needed_channels(isolated, self.model))

    def masked_freezing(self, inputs: Any) -> Freezing:
        """What the last task needs and no earlier one does, for a training loop of your own.

        ::

            with trainer.tasks[-1].masked(model):
                with trainer.masked_freezing(inputs).attach(optimizer):
                    ...

        The task answers rightly under its mask from then on: ``trainer.task(masked=True)``. To
        infer the task of a sample, call ``trainer.update_features(data)``.

        Args:
            inputs: Of one call of the model, on its device.

        Raises:
            ArgumentError: It needs nothing of its own.
            ModelMismatchError: A slice does not cut a path between layers.
        """
        *earlier, last = self.tasks
        isolated = isolated_slices(earlier, self.model, inputs)
        frozen = self._frozen(earlier, isolated)
        needed = needed_entries(last, self.model, self.head)
        trainable = {name: entries & ~frozen[name] for name, entries in needed.items()}
        return Freezing(self.model, trainable, needed_channels(isolated, self.model))

    def _add_accuracies(self) -> None:
        """A row of the accuracies of all tasks as they are now, where any can be measured."""
        given = [self._validations.get(task.name) for task in self.tasks]
        if all(validation is None for validation in given):
            return
        found = []
        for position, validation in enumerate(given):
            with self.task(position) as model:
                found.append(accuracy_of_task(model, validation))
        self.accuracies = self.accuracies.with_row([task.name for task in self.tasks], found)

    def _frozen(self, tasks: Sequence[Task], slices: Sequence[Slice]) -> dict[str, Tensor]:
        """Parameter -> True for entries that tasks need, or that require no gradient anyway."""
        frozen = all_needed_entries(tasks, self.model, self.head, slices)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                frozen[name].fill_(True)
        return frozen

    def _free_isolated(self, isolated: Sequence[Slice]) -> list[int]:
        """Free neurons of each layer that every mask isolates."""
        shared = set.intersection(*(set(part.kept) for part in isolated))
        return [count for name, count in self.free.items() if name in shared]

    @property
    def _outputs(self) -> int:
        return outputs_of(self.model, self.head)

    def _check_classes(self, classes: tuple[int, ...], *, grows: bool) -> None:
        width = self._outputs
        grows = grows and isinstance(submodule(self.model, self.head), nn.Linear)
        if not classes or classes[0] < 0 or (classes[-1] >= width and not grows):
            shown = ", ".join(map(str, classes[:8])) + (", ..." if len(classes) > 8 else "")
            raise DataError(
                f"the classes of the task are {shown}, but {self.head} has {width} "
                f"outputs: 0 to {width - 1}; correct the labels, train the model on them first, or "
                "let a Linear head grow with grow=True"
            )

    def _check(self, task: Task) -> None:
        width = self._outputs
        check_fits(task.slice.groups, self.model)
        for group in task.slice.groups:
            if any(member.name == self.head and member.side != "in" for member in group.members):
                raise ArgumentError(
                    f"{self.head} is sliced, so that it does not make the outputs; name the layer "
                    "that does with head="
                )
        check_weights(self.model, task.weights)
        if task.outputs > width or max(task.classes) >= task.outputs:
            raise ModelMismatchError(
                f"{task.name!r} was learned with {task.outputs} outputs, the model's {self.head} "
                f"has {width}; load the model that learned the task"
            )

    def _new_name(self, name: str | None) -> str:
        names = [task.name for task in self.tasks]
        if name in names:
            raise ArgumentError(f"there is a task {name!r} already; learned are {names}")
        numbered = (f"task {number}" for number in itertools.count(len(names) + 1))
        return name or next(other for other in numbered if other not in names)

    def _position(self, task: int | str) -> int:
        names = [known.name for known in self.tasks]
        if isinstance(task, str) and task in names:
            return names.index(task)
        if isinstance(task, int) and -len(names) <= task < len(names):
            return task % len(names)
        raise ArgumentError(
            f"there is no task {task!r}; learned are {names}: give a name or a position"
        )
