"""Incremental development: new tasks in the neurons that the tasks before left free.

A task is a slice and the classes it owns. What its masked model computes depends on the critical
entries alone (see :mod:`nss_prune.adaptation.freezing`) and on its own rows of the classifier:
these keep their bits while later tasks train everything else, so that its outputs under its mask
are bit-identical for good. Later tasks use earlier neurons, and change those only through entries
whose inputs are zero under the masks of earlier tasks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from nss_prune.adaptation.classifier import grow_classifier
from nss_prune.adaptation.datasets import Data, classes_in, mixed, on_device_of, repeatable
from nss_prune.adaptation.learned import LearnedTasks
from nss_prune.adaptation.old_names import OldNames, present_shares
from nss_prune.adaptation.replay import Replay, replayed
from nss_prune.adaptation.task_finder import THETAS, Allocation, TaskFinder
from nss_prune.adaptation.task_training import Metrics, TaskTraining, Validation
from nss_prune.adaptation.tasks import Task
from nss_prune.adaptation.training import Loss, Objective, TaskLoss, objective_for
from nss_prune.core.undo import restored_on_error
from nss_prune.errors import ArgumentError
from nss_prune.graph.slices import Slice

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nss_prune.adaptation.task_training import TrainingArguments

__all__ = ["THETAS", "IncrementalTrainer", "Objective", "Task", "TaskLoss", "mixed"]


class IncrementalTrainer(LearnedTasks, OldNames):
    """Teaches a model one task after the other; each keeps what it has learned (paper, RQ4).

    ::

        trainer = IncrementalTrainer(model, data=task_a)
        trainer.fit(task_b)
        with trainer.task_a():      # A: its critical neurons only
            scores = model(inputs)
        with trainer.task_b():      # B: the whole network
            scores = model(inputs)

    Without replay, the scores of every task under its mask are bit-identical before and after
    later tasks are learned. Under torchrun, each process gives its part of the data, to the
    constructor too; all end with the same model and tasks, or raise what one of them raised.

    Args:
        model: Trained on the first task; it is changed by :meth:`fit` and
            :meth:`finetune_masked` alone.
        slice: The critical neurons of the first task; found with ``data`` by default.
        data: Batches of (inputs, labels) of the first task, on any device; they can be iterated
            repeatedly. Needed without ``slice``, and for a share of it as replay.
        classes: The outputs that the first task owns; by default the labels in ``data``, or all
            outputs of the classifier where there is no data.
        tasks: All tasks learned so far, in their order, in place of ``slice``: loaded from files.
        head: The classifier, the layer that makes the outputs, or its name; by default the last
            Linear layer, or the last convolution where there is none.
        grow: Add rows to the classifier for labels that it is too small for; otherwise they are
            an error. Labels that earlier tasks know share their rows: what is critical to these
            in them stays as it is, the rest trains.
        theta: Of each task's slice, in (0, 1], or "auto": a fifth of the task's own data is held
            out from the profile, and θ goes down :data:`THETAS` for as long as the mask loses at
            most ``tolerance`` there, and the outputs diverge by at most ``divergence``.
        tolerance: Accuracy that the mask may cost with theta="auto", in percentage points.
        divergence: Kullback-Leibler divergence of the task's outputs under the mask from those of
            the whole network, in nats a sample, with theta="auto"; or 5 % of these outputs' own
            entropy, where that is more. It sees what a mask costs where the model, which was
            trained on these samples, still gets all of them right.
        keep: With theta="auto", the share of each layer's neurons that a task keeps, in (0, 1],
            whatever that costs: those that are critical at the least θ. :meth:`finetune_masked`
            gets the accuracy back. (Its old name is ``share``.)
        keep_weights: Of the weights that a task's critical neurons have and no earlier task holds,
            it keeps the best, whatever that costs: as many as this share, in (0, 1], of all weights
            of Linear layers and convolutions but the classifier's. The others are free for later
            tasks; :meth:`finetune_masked` gets the accuracy back. Such a task is kept with one bit
            for each weight of the model, others with one for each neuron. Leave some neurons free
            too, by ``keep`` or ``theta``: the norms of critical ones keep their statistics,
            whatever they are fed, so that where all are critical a high learning rate diverges.
            (Its old name is ``weights``.)
        method: Which weights are the best, as :func:`nss_prune.sparsify` takes it.
        seed: Of the draws of held-out and replayed samples.
        validation: Batches of (inputs, labels) of the first task, or a function of the model that
            gives a score, for ``accuracies``.
        progress: Show progress bars; by default when stderr is a terminal.
        **profile_arguments: As :func:`nss_prune.profile` takes them.

    Attributes:
        tasks: What is learned, in order.
        accuracies: Of all tasks with validation batches after each one learned, with their
            forgetting.
        history: Metrics of each epoch of the last training.

    Raises:
        ArgumentError: An argument is outside what it may be.
        ModelMismatchError: A slice or task is of another model.
        DataError: Data that cannot be used, see :func:`nss_prune.profile`.
    """

    def __init__(
        self,
        model: nn.Module,
        slice: Slice | None = None,
        *,
        data: Data | None = None,
        classes: Collection[int] | None = None,
        tasks: Sequence[Task] = (),
        head: nn.Module | str | None = None,
        grow: bool = True,
        theta: float | Literal["auto"] = "auto",
        tolerance: float = 0.2,
        divergence: float = 5e-4,
        keep: float | None = None,
        keep_weights: float | None = None,
        method: str | Allocation = "lamp",
        seed: int = 0,
        validation: Validation | None = None,
        progress: bool | None = None,
        **profile_arguments: Any,
    ) -> None:
        keep, keep_weights = present_shares(profile_arguments, keep, keep_weights)
        self.grow = grow
        self.theta = theta
        self.tolerance = tolerance
        self.divergence = divergence
        self.keep = keep
        self.keep_weights = keep_weights
        self.method = method
        self.seed = seed
        self.progress = progress
        self.profile_arguments = profile_arguments
        self._finder()  # checks them
        self._data: list[Data] = [] if data is None else [repeatable(data)]
        super().__init__(model, head, tasks)
        if not self.tasks:
            first = self._first(slice, classes)
            self._check(first)
            self.tasks = (first,)
        self.history: tuple[Metrics, ...] = ()
        self._validations[self.tasks[0].name] = validation
        self._add_accuracies()

    def fit(
        self,
        data: Data,
        validation: Validation | None = None,
        *,
        replay: Replay | None = None,
        name: str | None = None,
        **training: Unpack[TrainingArguments],
    ) -> Task:
        """Learn the next task in the neurons that are free, and find its critical ones.

        Args:
            data: Batches of (inputs, labels), which can be iterated repeatedly; labels are
                outputs of the classifier. Each is moved to the model's device.
            validation: Other such batches of the task: its accuracy among its own classes, by the
                whole network, is the score after each epoch. Or a function of the model that
                gives a score, larger for better.
            replay: Samples of earlier tasks for the whole network to learn again: a share in
                (0, 1] of all data seen by this trainer, a sampler over the data set of ``data``,
                or batches. Each batch of the task gets one of them, over and over. What is
                critical to earlier tasks stays frozen all the same.
            name: Of the task; "task 2" and so on by default.
            **training: ``epochs``, ``optimizer``, ``learning_rate``, ``patience``, ``checkpoint``,
                ``on_epoch`` and others, see :class:`nss_prune.training.settings.TrainingSettings`.
                ``loss`` is "task" (the default), cross entropy over the classes of the task, for
                replayed samples over those of the earlier tasks; "all", over all classes known so
                far; or a function of (outputs, labels) that gives one value for each sample or
                their mean.

        Returns: The task, now the last of ``tasks``.

        Raises:
            ArgumentError, DataError: The arguments, or other labels.
            NothingToPruneError: No neuron is free.
            ModelMismatchError: The checkpoint is of another model, task or hyper-parameters.
            NumericalError: The loss or the weights became NaN or infinite.
            Exception: What the data raises. Whatever is raised, the model is as it was before, and
                a call with the same ``checkpoint`` and ``resume=True`` goes on.
        """
        how = TaskTraining.of(training, validation, self.progress)
        name = self._new_name(name)
        batches = on_device_of(self.model, repeatable(data))
        classes = classes_in(data)
        self._check_classes(classes, grows=self.grow)
        again = None if replay is None else replayed(replay, self._data, self.seed, batches.device)
        objective = objective_for(how.settings.loss, classes, self.tasks)
        with restored_on_error(self.model, values=True, owner=self):
            grow_classifier(self.model, self.head, classes[-1] + 1)
            history = how.run(
                self.freezing(batches.first_inputs()),
                objective,
                batches,
                replayed=again,
                classes=classes,
                purpose={"task": len(self.tasks)},
            )
            found = how.settings.loss if callable(how.settings.loss) else None
            task = self.add(data, name, found, validation=validation)
            self.history = history
        return task

    def finetune_masked(
        self,
        data: Data | None = None,
        validation: Validation | None = None,
        **training: Unpack[TrainingArguments],
    ) -> None:
        """Fine-tune the critical neurons of the last task, alone under its mask, on its own data.

        They learn to do by themselves what the whole network did, so that a small slice will do,
        which leaves more for later tasks. What earlier tasks need keeps its bits. From then on the
        task answers with its mask, also where it is the last.

        Args:
            data: Batches of (inputs, labels) of the task; by default what it was found with.
            validation: As :meth:`fit` takes it, under the mask.
            **training: As :meth:`fit` takes them; ``loss`` is a function of (outputs, labels),
                cross entropy over the classes of the task by default.

        Raises:
            ArgumentError: The arguments, or no data of the task is known.
            ModelMismatchError: The checkpoint is of another model, task or hyper-parameters.
            NumericalError: The loss or the weights became NaN or infinite.
            Exception: What the data raises. Whatever is raised, the model is as it was before.
        """
        how = TaskTraining.of(training, validation, self.progress)
        task = self.tasks[-1]
        given = self._data_of_last() if data is None else repeatable(data)
        batches = on_device_of(self.model, given)
        of_task = how.settings.loss or TaskLoss(task.classes)
        with restored_on_error(self.model, values=True, owner=self):
            freezing = self.masked_freezing(batches.first_inputs())
            with task.masked(self.model):
                history = how.run(
                    freezing,
                    Objective(of_task, of_task),
                    batches,
                    classes=task.classes,
                    purpose={"settled": len(self.tasks)},
                )
            self.tasks = (*self.tasks[:-1], replace(task, finetuned=True))
            self.update_features(batches)
            self.history = history
            if validation is not None:
                self._validations[task.name] = validation
            self._add_accuracies()

    def _data_of_last(self) -> Data:
        if len(self._data) < len(self.tasks):
            name = self.tasks[-1].name
            raise ArgumentError(f"the data of {name!r} is not known here; give data=")
        return self._data[-1]

    def add(
        self,
        data: Data,
        name: str | None = None,
        loss: Loss | None = None,
        *,
        validation: Validation | None = None,
    ) -> Task:
        """Record what the model has just learned as its next task, with its critical neurons.

        Args:
            data: Batches of (inputs, labels) of the task, which can be iterated repeatedly.
            name: Of the task; "task 2" and so on by default.
            loss: That it was trained with; cross entropy over its classes by default.
            validation: Other such batches, for ``accuracies``.

        Returns:
            The task, now the last of ``tasks``.

        Raises:
            ArgumentError, DataError: The name is taken, or the labels are outside the classifier.
        """
        name = self._new_name(name)
        classes = classes_in(repeatable(data))
        self._check_classes(classes, grows=False)
        task = self._found(name, data, classes, loss)
        with restored_on_error(self.model, owner=self):
            self.tasks = (*self.tasks, task)
            self._data.append(data)
            self._validations[task.name] = validation
            self._add_accuracies()
        return task

    def _finder(self) -> TaskFinder:
        return TaskFinder(
            theta=self.theta,
            tolerance=self.tolerance,
            divergence=self.divergence,
            keep=self.keep,
            keep_weights=self.keep_weights,
            method=self.method,
            seed=self.seed,
            progress=self.progress,
            profile_arguments=self.profile_arguments,
        )

    def _found(self, name: str, data: Data, classes: tuple[int, ...], loss: Loss | None) -> Task:
        """The task with its neurons and weights; the model has just learned it."""
        finder = self._finder()
        task = finder.find(
            self.model,
            self.head,
            data,
            name=name,
            classes=classes,
            loss=loss or TaskLoss(classes),
        )
        task = finder.prune_weights(self.model, self.head, task, self.tasks)
        return self._with_features(task, data)

    def _first(self, slice: Slice | None, classes: Collection[int] | None) -> Task:
        if slice is None and not self._data:
            raise ArgumentError(
                "neither a slice nor data of the first task is given; pass "
                "slice=profile(model, data).slice(theta) or data="
            )
        width = self._outputs
        if classes is not None:
            owned = tuple(sorted(set(classes)))
        else:
            owned = classes_in(self._data[0]) if self._data else tuple(range(width))
        self._check_classes(owned, grows=False)
        if slice is None:
            return self._found("task 1", self._data[0], owned, None)
        first = Task("task 1", slice, owned, width)
        return self._finder().prune_weights(self.model, self.head, first, ())
