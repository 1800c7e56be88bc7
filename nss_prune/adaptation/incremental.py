"""Incremental development: new tasks in the neurons that the tasks before left free.

A task is a slice and the classes it owns. What its masked model computes depends on the critical
entries alone (see :mod:`nss_prune.adaptation.freezing`) and on its own rows of the head: these keep
their bits while later tasks train everything else, so that its outputs under its mask are
bit-identical for good. Later tasks read earlier neurons, and change those only through entries
that read zero under the masks of earlier tasks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler

from nss_prune.adaptation.checkpoint import Checkpoint
from nss_prune.adaptation.classifier import find_head, grown, outputs_of
from nss_prune.adaptation.datasets import (
    Chained,
    Data,
    Moved,
    classes_in,
    mixed,
    parts,
    repeatable,
    sampled,
    with_classes,
)
from nss_prune.adaptation.freezing import Freezing, critical_channels, critical_entries
from nss_prune.adaptation.isolation import isolated_part
from nss_prune.adaptation.partial_gradients import treats_entries_apart
from nss_prune.adaptation.task_weights import check_weights, thinned
from nss_prune.adaptation.tasks import Task, least_uncertain
from nss_prune.adaptation.training import (
    Objective,
    OptimizerFactory,
    TaskLoss,
    make_optimizer,
    one_pass,
)
from nss_prune.core.models import device_of, evaluation, flags_kept, run, submodule
from nss_prune.core.outputs import class_scores
from nss_prune.core.undo import undone_on_failure
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError, NothingToPruneError
from nss_prune.graph.axes import check_fits, parameter_axes
from nss_prune.graph.slices import Slice
from nss_prune.profiling.accumulation import Loss
from nss_prune.profiling.run import profile
from nss_prune.profiling.selection import check_theta
from nss_prune.unstructured.allocation import Allocation, find_method

__all__ = ["THETAS", "IncrementalTrainer", "Objective", "Task", "TaskLoss", "mixed"]

THETAS = (0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.5)
"""What theta="auto" tries, in this order."""

HELD_OUT = 0.2  # of a task's data: it chooses θ, the rest is profiled
OF_ENTROPY = 0.05  # by as much outputs may diverge that are unsure anyway


Replay = float | Sampler[Any] | Data


class IncrementalTrainer:
    """Teaches a model one task after the other; each keeps what it has learned (paper, RQ4).

    ::

        trainer = IncrementalTrainer(model, data=task_a)
        trainer.fit(task_b)
        with trainer.task_a():      # A: its critical neurons only
            scores = model(inputs)
        with trainer.task_b():      # B: the whole network
            scores = model(inputs)

    Without replay, the scores of every task under its mask are bit-identical before and after
    later tasks are learned.

    Args:
        model: Trained on the first task; it is changed by :meth:`fit` alone.
        slice: The critical neurons of the first task; found with ``data`` by default.
        data: Batches of (inputs, labels) of the first task, on any device; they can be iterated
            repeatedly. Needed without ``slice``, and for a share of it as replay.
        classes: The outputs that the first task owns; by default the labels in ``data``, or all
            outputs of the head where there is no data.
        tasks: All tasks learned so far, in their order, in place of ``slice``: loaded from files.
        head: The layer that makes the outputs, or its name; by default the last Linear layer, or
            the last convolution where there is none.
        grow: Add rows to the head for labels that it is too small for; otherwise they are an
            error. Labels that earlier tasks know share their rows: what is critical to these in
            them stays as it is, the rest trains.
        theta: Of each task's slice, in (0, 1], or "auto": a fifth of the task's own data is held
            out from the profile, and θ goes down :data:`THETAS` for as long as the mask loses at
            most ``tolerance`` there, and the outputs diverge by at most ``divergence``.
        tolerance: Accuracy that the mask may cost with theta="auto", in percentage points.
        divergence: Kullback-Leibler divergence of the task's outputs under the mask from those of
            the whole network, in nats a sample, with theta="auto"; or 5 % of these outputs' own
            entropy, where that is more. It sees what a mask costs where the model, which was
            trained on these samples, still gets all of them right.
        share: With theta="auto", the share of each layer's neurons that a task takes, in (0, 1],
            whatever that costs: those that are critical at the least θ. :meth:`settle` gets the
            accuracy back.
        weights: Of the weights that a task's critical neurons have and no earlier task holds, it
            keeps the best, whatever that costs: as many as this share, in (0, 1], of all weights
            of Linear layers and convolutions but the head's. The others are free for later tasks;
            :meth:`settle` gets the accuracy back. Such a task is kept with one bit for each weight
            of the model, others with one for each neuron. Leave some neurons free too, by
            ``share`` or ``theta``: the norms of critical ones keep their statistics, whatever they
            are fed, so that where all are critical a high learning rate diverges.
        method: Which weights are the best, as :func:`nss_prune.sparsify` takes it.
        seed: Of the draws of held-out and replayed samples.
        progress: Show progress bars; by default when stderr is a terminal.
        **profile_arguments: As :func:`nss_prune.profile` takes them.

    Attributes:
        tasks: What is learned, in order.

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
        share: float | None = None,
        weights: float | None = None,
        method: str | Allocation = "lamp",
        seed: int = 0,
        progress: bool | None = None,
        **profile_arguments: Any,
    ) -> None:
        if not tolerance >= 0:
            raise ArgumentError(f"tolerance is {tolerance}; give 0 or more percentage points")
        if not divergence > 0:
            raise ArgumentError(f"divergence is {divergence}; give more than 0 nats a sample")
        if share is not None and not (0 < share <= 1 and theta == "auto"):
            raise ArgumentError(
                f"share is {share} with theta={theta!r}; give a share of each layer's neurons in "
                '(0, 1], with theta="auto"'
            )
        if weights is not None and not 0 < weights <= 1:
            raise ArgumentError(f"weights is {weights}; give a share of all weights in (0, 1]")
        find_method(method)
        self.model = model
        self.head = find_head(model, head)
        self.grow = grow
        self.theta = theta if theta == "auto" else check_theta(theta)
        self.tolerance = tolerance
        self.divergence = divergence
        self.share = share
        self.weights = weights
        self.method = method
        self.seed = seed
        self.progress = progress
        self.profile_arguments = profile_arguments
        self._data: list[Data] = [] if data is None else [repeatable(data)]
        self.tasks = tuple(tasks) or (self._first(slice, classes),)
        for task in self.tasks:
            self._check(task)

    def fit(
        self,
        task_b: Data,
        replay: Replay | None = None,
        *,
        epochs: int = 5,
        name: str | None = None,
        loss: Literal["task", "all"] | Loss = "task",
        optimizer: str | OptimizerFactory = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
    ) -> Task:
        """Learn the next task in the neurons that are free, and find its critical ones.

        Args:
            task_b: Batches of (inputs, labels), which can be iterated repeatedly; labels are
                outputs of the head. Each is moved to the model's device.
            replay: Samples of earlier tasks for the whole network to learn again: a share in
                (0, 1] of all data seen by this trainer, a sampler over the data set of ``data``,
                or batches. Each batch of the task gets one of them, starting over when they end.
                What is critical to earlier tasks stays frozen all the same.
            epochs: Passes over ``task_b``.
            name: Of the task; "task 2" and so on by default.
            loss: "task", cross entropy over the classes of the task (for replayed samples over
                those of the earlier tasks); "all", over all classes known so far; or a function
                of (outputs, labels) that gives one value for each sample or their mean.
            optimizer: A name that timm knows, or a function of the list of the parameters that
                train. (A fused AdamW is several times as fast on a CPU.)
            learning_rate: For an optimiser by name, as ``weight_decay`` is, which spares biases
                and norms.
            checkpoint: File to write after every epoch.
            resume: Where the checkpoint is there already, go on after its last epoch.

        Returns:
            The task, now the last of ``tasks``.

        Raises:
            ArgumentError, DataError: The arguments, or labels outside the head.
            NothingToPruneError: No neuron is free.
            ModelMismatchError: The checkpoint is of another model or task.
            NumericalError: The loss or the weights became NaN or infinite.
            Exception: What the data raises. Whatever is raised, the model is as it was before
                the call, and a call with the same ``checkpoint`` goes on after its last epoch.
        """
        if not isinstance(epochs, int) or epochs < 1:
            raise ArgumentError(f"epochs is {epochs!r}; give 1 or more")
        name = self._new_name(name)
        data = Moved(repeatable(task_b), device_of(self.model), with_classes)
        classes = classes_in(task_b)
        self._check_classes(classes, self.grow)
        replayed = None if replay is None else self._replayed(replay, data.device)
        objective = self._objective(loss, classes)
        with undone_on_failure(self.model), grown(self.model, self.head, classes[-1] + 1):
            freezing = self.freezing(next(iter(data))[0])
            updates = make_optimizer(
                freezing, optimizer, learning_rate=learning_rate, weight_decay=weight_decay
            )
            purpose = {"task": len(self.tasks), "classes": list(classes)}
            saved = Checkpoint(checkpoint, freezing, updates, purpose)
            training = Training(freezing, updates, objective, saved)
            training.run(data, replayed, epochs, resume=resume, progress=self.progress)
            return self.add(task_b, name, loss if callable(loss) else None)

    def settle(
        self,
        data: Data | None = None,
        *,
        epochs: int = 2,
        loss: Loss | None = None,
        optimizer: str | OptimizerFactory = "adamw",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = True,
    ) -> None:
        """Train the critical neurons of the last task, alone under its mask, on its own data.

        They learn to do by themselves what the whole network did, so that a small slice will do,
        which leaves more for later tasks. What earlier tasks need keeps its bits. From then on the
        task answers with its mask, also where it is the last.

        Args:
            data: Batches of (inputs, labels) of the task; by default what it was found with.
            epochs: Passes over them.
            loss: Of (outputs, labels); cross entropy over the classes of the task by default.
            optimizer, learning_rate, weight_decay, checkpoint, resume: As :meth:`fit` takes them.

        Raises:
            ArgumentError: The arguments, or no data of the task is known.
            ModelMismatchError: The checkpoint is of another model or task.
            NumericalError: The loss or the weights became NaN or infinite.
            Exception: What the data raises. Whatever is raised, the model is as it was before.
        """
        if not isinstance(epochs, int) or epochs < 1:
            raise ArgumentError(f"epochs is {epochs!r}; give 1 or more")
        task = self.tasks[-1]
        if data is None and len(self._data) < len(self.tasks):
            raise ArgumentError(f"the data of {task.name!r} is not known here; give data=")
        given = self._data[-1] if data is None else repeatable(data)
        data = Moved(given, device_of(self.model), with_classes)
        of_task = loss or TaskLoss(task.classes)
        with undone_on_failure(self.model):
            freezing = self.settling(next(iter(data))[0])
            updates = make_optimizer(
                freezing, optimizer, learning_rate=learning_rate, weight_decay=weight_decay
            )
            purpose = {"settled": len(self.tasks), "classes": list(task.classes)}
            saved = Checkpoint(checkpoint, freezing, updates, purpose)
            training = Training(freezing, updates, Objective(of_task, of_task), saved)
            with task.masked(self.model):
                training.run(data, None, epochs, resume=resume, progress=self.progress)
        self.tasks = (*self.tasks[:-1], replace(task, settled=True))

    def settling(self, inputs: Any) -> Freezing:
        """What the last task needs and no earlier one does, for a training loop of your own.

        ::

            with trainer.tasks[-1].masked(model):
                with trainer.settling(inputs).attach(optimizer):
                    ...

        The task answers rightly under its mask from then on: ``trainer.task(masked=True)``.

        Args:
            inputs: Of one call of the model, on its device.

        Raises:
            ArgumentError: It needs nothing of its own.
            ModelMismatchError: A slice does not cut a path between layers.
        """
        earlier = self.tasks[:-1]
        isolated = [self._isolated_part(task, inputs) for task in earlier]
        frozen, channels = self._needed(earlier, isolated)
        own = self._critical_entries(self.tasks[-1])
        trainable = {name: entries & ~frozen[name] for name, entries in own.items()}
        return Freezing(self.model, trainable, channels)

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
        isolated = [self._isolated_part(task, inputs) for task in self.tasks]
        frozen, channels = self._needed(self.tasks, isolated)
        if not self._free_neurons(isolated) and not self._free_weights(frozen):
            raise NothingToPruneError(
                f"no layer has a neuron that is free for another task: {len(self.tasks)} task(s) "
                "take them all; give earlier tasks smaller slices (a smaller theta or a larger "
                "tolerance) or a share of the weights, or take a wider model"
            )
        return Freezing(self.model, {name: ~mask for name, mask in frozen.items()}, channels)

    def _free_neurons(self, isolated: Sequence[Slice]) -> bool:
        """Whether a layer that every mask isolates has a neuron that is critical to no task."""
        shared = set.intersection(*(set(part.kept) for part in isolated))
        return any(count for name, count in self.free.items() if name in shared)

    def _free_weights(self, frozen: Mapping[str, Tensor]) -> bool:
        """Whether every task keeps some weights only, and one of these is kept by none."""
        thin = set.intersection(*(set(task.weights) for task in self.tasks))
        return any(not frozen[name].all() for name in thin)

    def add(self, data: Data, name: str | None = None, loss: Loss | None = None) -> Task:
        """Record what the model has just learned as its next task, with its critical neurons.

        Args:
            data: Batches of (inputs, labels) of the task, which can be iterated repeatedly.
            name: Of the task; "task 2" and so on by default.
            loss: That it was trained with; cross entropy over its classes by default.

        Returns:
            The task, now the last of ``tasks``.

        Raises:
            ArgumentError, DataError: The name is taken, or the labels are outside the head.
        """
        name = self._new_name(name)
        classes = classes_in(repeatable(data))
        self._check_classes(classes, grows=False)
        task = self._thinned(self._task(name, data, classes, loss), self.tasks)
        self.tasks = (*self.tasks, task)
        self._data.append(data)
        return task

    @contextlib.contextmanager
    def task(self, task: int | str = -1, *, masked: bool | None = None) -> Iterator[nn.Module]:
        """Inference for one task: its neurons, evaluation mode, −∞ for classes it does not own.

        Args:
            task: Position or name.
            masked: Only its critical neurons. By default for all but the last of several tasks,
                which uses the whole network unless it is settled.

        Raises:
            ArgumentError: There is no such task.
        """
        position = self._position(task)
        found = self.tasks[position]
        whole = 0 < position == len(self.tasks) - 1 and not found.settled
        with self._inference(found, not whole if masked is None else masked):
            yield self.model

    def task_a(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Inference for the first task, with its mask."""
        return self.task(0)

    def task_b(self) -> contextlib.AbstractContextManager[nn.Module]:
        """Inference for the second task: the whole network, its mask once there is a third.

        A task that is settled uses its mask from then on.

        Raises:
            ArgumentError: It is not learned yet.
        """
        return self.task(1)

    @torch.no_grad()
    def predict(self, inputs: Any, task: int | str | None = None) -> Tensor:
        """Classes, ``[samples]``.

        Args:
            inputs: Of one call of the model, on its device.
            task: To which all samples belong; inferred for each by default, see
                :meth:`infer_task`.

        Raises:
            ArgumentError: There is no such task.
        """
        if task is not None:
            with self.task(task):
                return class_scores(run(self.model, inputs, 0)).argmax(1)
        scores = self._scores(inputs)
        chosen = least_uncertain(scores)
        classes = torch.stack([each.argmax(1) for each in scores])
        return classes.gather(0, chosen[None])[0]

    @torch.no_grad()
    def infer_task(self, inputs: Any) -> Tensor:
        """Position of the task whose outputs have the least entropy, ``[samples]``.

        The entropy of a task is relative to that of its classes at random, ln(classes), so that
        tasks of different size compare; a task with a single class says nothing and comes last.
        """
        return least_uncertain(self._scores(inputs))

    @property
    def free(self) -> dict[str, int]:
        """Layer -> neurons that are critical to none of the tasks."""
        slices = [task.slice.kept for task in self.tasks]
        shared = [name for name in slices[0] if all(name in kept for kept in slices)]
        return {
            name: int((~torch.stack([kept[name] for kept in slices])).all(0).sum())
            for name in shared
        }

    def _check(self, task: Task) -> None:
        width = outputs_of(self.model, self.head)
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

    def _first(self, slice: Slice | None, classes: Collection[int] | None) -> Task:
        if slice is None and not self._data:
            raise ArgumentError(
                "neither a slice nor data of the first task is given; pass "
                "slice=profile(model, data).slice(theta) or data="
            )
        width = outputs_of(self.model, self.head)
        if classes is not None:
            owned = tuple(sorted(set(classes)))
        else:
            owned = classes_in(self._data[0]) if self._data else tuple(range(width))
        self._check_classes(owned, grows=False)
        if slice is not None:
            first = Task("task 1", slice, owned, width)
        else:
            first = self._task("task 1", self._data[0], owned, None)
        return self._thinned(first, ())

    def _check_classes(self, classes: tuple[int, ...], grows: bool) -> None:
        width = outputs_of(self.model, self.head)
        grows = grows and isinstance(submodule(self.model, self.head), nn.Linear)
        if not classes or classes[0] < 0 or (classes[-1] >= width and not grows):
            raise DataError(
                f"the classes of the task are {_shown(classes)}, but {self.head} has {width} "
                f"outputs: 0 to {width - 1}; correct the labels, train the model on them first, or "
                "let a Linear head grow with grow=True"
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

    @contextlib.contextmanager
    def _inference(self, task: Task, masked: bool) -> Iterator[None]:
        head = submodule(self.model, self.head)
        with contextlib.ExitStack() as stack, flags_kept(self.model):
            self.model.eval()
            if masked:
                stack.enter_context(task.masked(self.model))
            stack.callback(head.register_forward_hook(task.own_outputs).remove)
            yield

    def _scores(self, inputs: Any) -> list[Tensor]:
        """The scores that each task gives, ``[samples, classes]``."""
        scores = []
        for position in range(len(self.tasks)):
            with self.task(position):
                scores.append(class_scores(run(self.model, inputs, 0)))
        return scores

    def _task(self, name: str, data: Data, classes: tuple[int, ...], loss: Loss | None) -> Task:
        """The task with its slice; the model has learned it."""
        outputs = outputs_of(self.model, self.head)
        device = device_of(self.model)
        arguments = {
            "loss": loss or TaskLoss(classes),
            "progress": self.progress,
            **self.profile_arguments,
        }
        if not isinstance(self.theta, str) or self.share is not None:
            found = profile(self.model, _placed(data, device), **arguments)
            theta = None if isinstance(self.theta, str) else self.theta
            return Task(name, found.slice(theta, ratio=self.share), classes, outputs)
        held_out, profiled = parts(data, HELD_OUT, self.seed)
        found = profile(self.model, _placed(profiled, device), **arguments)
        best = Task(name, found.slice(1.0), classes, outputs)
        held_out = Moved(held_out, device, with_classes)
        whole = self._answers(best, held_out, masked=False)
        for theta in THETAS:
            task = Task(name, found.slice(theta), classes, outputs)
            if not self._holds(whole, self._answers(task, held_out, masked=True)):
                return best
            best = task
        return best

    def _thinned(self, task: Task, earlier: Sequence[Task]) -> Task:
        """The task with the weights that it keeps, of those that its neurons have."""
        if self.weights is None:
            return task
        check_fits(task.slice.groups, self.model)
        held = self._held(earlier, [other.slice for other in earlier])
        weights = thinned(
            self.model, self._critical_entries(task), held, self.weights,
            method=self.method, head=self.head,
        )  # fmt: skip
        return replace(task, weights=weights)

    def _holds(self, whole: tuple[Tensor, float], masked: tuple[Tensor, float]) -> bool:
        """Whether a mask costs no more accuracy and divergence than it may."""
        if masked[1] < whole[1] - self.tolerance / 100:
            return False
        found, wanted = masked[0], whole[0]
        drift = nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
        entropy = -(wanted.exp() * wanted).sum(1).mean()
        return float(drift) <= max(self.divergence, OF_ENTROPY * float(entropy))

    @torch.no_grad()
    def _answers(self, task: Task, data: Data, masked: bool) -> tuple[Tensor, float]:
        """Logarithms of the task's probabilities, ``[samples, classes]``, and the share right."""
        probabilities, right = [], []
        with self._inference(task, masked), evaluation(self.model):
            for number, (inputs, labels) in enumerate(data):
                scores = class_scores(run(self.model, inputs, number)).float()
                probabilities.append(scores[:, list(task.classes)].log_softmax(1))
                right.append(scores.argmax(1) == labels)
        if not right:
            raise DataError(
                "no samples are held out to choose theta='auto'; give more data, or theta as a "
                "number"
            )
        return torch.cat(probabilities), float(torch.cat(right).float().mean())

    def _replayed(self, replay: Replay, device: torch.device) -> Moved:
        if isinstance(replay, (int, float)):
            if not 0 < replay <= 1 or not self._data:
                raise ArgumentError(
                    f"replay is {replay!r} with {len(self._data)} earlier data sets; give a share "
                    "in (0, 1] with data= of the first task, or batches to replay"
                )
            drawn = [parts(data, replay, self.seed)[0] for data in self._data]
            return Moved(Chained(drawn), device, with_classes)
        if isinstance(replay, Sampler):
            loader = self._data[0] if self._data else None
            if not isinstance(loader, DataLoader):
                raise ArgumentError("replay is a sampler; give data= as a DataLoader for it")
            return Moved(sampled(loader, replay), device, with_classes)
        return Moved(repeatable(replay), device, with_classes)

    def _objective(self, loss: Any, classes: tuple[int, ...]) -> Objective:
        if callable(loss):
            return Objective(loss, loss)
        earlier = {known for task in self.tasks for known in task.classes}
        if loss == "task":
            return Objective(TaskLoss(classes), TaskLoss(earlier))
        if loss == "all":
            return Objective(*[TaskLoss({*earlier, *classes})] * 2)
        raise ArgumentError(f"loss is {loss!r}; use 'task', 'all' or a function")

    def _needed(
        self, tasks: Sequence[Task], slices: Sequence[Slice]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Entries of parameters, and channels of running statistics, that tasks need.

        Args:
            slices: For each task, those of its layers that its mask isolates from the others.
        """
        frozen = self._held(tasks, slices)
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                frozen[name].fill_(True)
        channels: dict[str, Tensor] = {}
        for critical in slices:
            for name, kept in critical_channels(critical, self.model).items():
                channels[name] = channels.get(name, torch.zeros_like(kept)) | kept
        return frozen, channels

    def _held(self, tasks: Sequence[Task], slices: Sequence[Slice]) -> dict[str, Tensor]:
        """Entries of parameters that tasks keep, in their slices or these in place of them."""
        held = {
            name: torch.zeros_like(value, dtype=torch.bool)
            for name, value in self.model.named_parameters()
        }
        for task, critical in zip(tasks, slices, strict=True):
            for name, entries in self._critical_entries(task, critical).items():
                held[name] |= entries
        return held

    def _critical_entries(self, task: Task, critical: Slice | None = None) -> dict[str, Tensor]:
        """The entries that the task keeps, of the head those in the task's own rows.

        Args:
            critical: In place of the task's slice.
        """
        entries = critical_entries(critical or task.slice, self.model)
        for name, kept in task.weights.items():
            entries[name] &= kept.to(entries[name].device)
        head = submodule(self.model, self.head)
        others = torch.ones(outputs_of(self.model, self.head), dtype=torch.bool)
        others[list(task.classes)] = False
        for key, (made, _) in parameter_axes(head).items():
            mask = entries[f"{self.head}.{key}" if self.head else key]
            mask.index_fill_(made, others.nonzero().flatten().to(mask.device), False)
        return entries

    def _isolated_part(self, task: Task, inputs: Any) -> Slice:
        try:
            return isolated_part(task.slice, self.model, inputs)
        except ModelMismatchError as error:
            raise ModelMismatchError(f"{task.name!r} cannot be protected: {error}") from error


@dataclass(frozen=True)
class Training:
    """Epochs over a task, with a checkpoint after each.

    Attributes:
        freezing: What trains, of which model.
        optimizer: Of its parameters.
        objective: The loss.
        checkpoint: Of this training.
    """

    freezing: Freezing
    optimizer: Optimizer
    objective: Objective
    checkpoint: Checkpoint

    def run(
        self,
        data: Data,
        replayed: Data | None,
        epochs: int,
        *,
        resume: bool = True,
        progress: bool | None = None,
    ) -> None:
        """Train up to a number of epochs, those of the checkpoint included.

        Raises:
            DataError, ModelMismatchError, NumericalError: See :meth:`IncrementalTrainer.fit`.
        """
        found = self.checkpoint.load() if resume else None
        done = 0 if found is None else found[0]["epochs"]
        model = self.freezing.model
        read = not treats_entries_apart(self.optimizer)
        with (
            self.freezing.attach(self.optimizer, zero_gradients=read),
            contextlib.ExitStack() as stack,
        ):
            stack.callback(self.optimizer.zero_grad)
            for epoch in range(done, epochs):
                title = f"epoch {epoch + 1}/{epochs}"
                one_pass(model, mixed(data, replayed), self._step, title, progress)
                self.checkpoint.save({"epochs": epoch + 1})

    def _step(self, batch: tuple[Any, Tensor, int], number: int) -> Tensor:
        inputs, labels, own = batch
        loss = self.objective(run(self.freezing.model, inputs, number), labels, own)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def _placed(data: Data, device: torch.device) -> Data:
    # A DataLoader as it is can be profiled in the order of its categories.
    return data if device.type == "cpu" else Moved(data, device, with_classes)


def _shown(classes: tuple[int, ...]) -> str:
    return ", ".join(map(str, classes[:8])) + (", ..." if len(classes) > 8 else "")
