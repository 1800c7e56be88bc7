"""Classes of samples whose task is not given: the task is inferred first."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from nss_prune.adaptation.datasets import Data, repeatable
from nss_prune.adaptation.task_inference import (
    Score,
    TaskFeatures,
    entropy,
    pooled,
    share_of_energy,
)
from nss_prune.adaptation.tasks import Task
from nss_prune.core.batches import samples_in
from nss_prune.core.models import run
from nss_prune.core.outputs import class_scores
from nss_prune.errors import ArgumentError


class InferredTask:
    """Predictions of a model that has learned several tasks."""

    model: nn.Module
    head: str
    tasks: tuple[Task, ...]

    def task(
        self, task: int | str = -1, *, masked: bool | None = None
    ) -> AbstractContextManager[nn.Module]:
        """Inference for one task."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(
        self, inputs: Any, task: int | str | None = None, *, by: Score | None = None
    ) -> Tensor:
        """Classes, ``[samples]``.

        Args:
            inputs: Of one call of the model, on its device.
            task: To which all samples belong; inferred for each by default.
            by: What infers it, see :meth:`infer_task`.

        Raises:
            ArgumentError: There is no such task, or no such score of the tasks.
        """
        if task is not None:
            with self.task(task):
                return class_scores(run(self.model, inputs, 0)).argmax(1)
        classes = torch.stack([scores.argmax(1) for scores in self._scores(inputs)])
        return classes.gather(0, self.infer_task(inputs, by=by)[None])[0]

    @torch.no_grad()
    def infer_task(self, inputs: Any, *, by: Score | None = None) -> Tensor:
        """Position of the task that each sample most likely belongs to, ``[samples]``.

        Args:
            inputs: Of one call of the model, on its device.
            by: "features", how far the activations of a task's critical neurons are from those
                of its own samples; "energy" or "entropy" of its outputs; "both", features and
                energy, see :mod:`nss_prune.adaptation.task_inference`. By default "both" where
                the data of all tasks was given, else "entropy".

        Raises:
            ArgumentError: There is no such score, or a task's data, which it needs, was not given.
        """
        if by is None:
            known = all(task.features is not None for task in self.tasks)
            by = "both" if known else "entropy"
        if by not in get_args(Score):
            raise ArgumentError(f"by is {by!r}; use one of {get_args(Score)}")
        if by == "entropy":
            return self._entropies(inputs).argmin(0)
        if by == "energy":
            return self._energies(inputs).argmin(0)
        distances = self._distances(inputs)
        if by == "both":
            share = share_of_energy(self._features(task) for task in self.tasks)
            distances = (1 - share) * distances + share * self._energies(inputs)
        return distances.argmin(0)

    def update_features(self, data: Data) -> None:
        """Find anew where the activations of the last task's neurons lie, by which it is inferred.

        For a training loop of your own under its mask, see
        :meth:`nss_prune.adaptation.learned.LearnedTasks.masked_freezing`.

        Args:
            data: Batches of (inputs, labels) of the task, which can be iterated repeatedly, on any
                device.

        Raises:
            DataError: The data can be iterated only once.
        """
        *earlier, last = self.tasks
        self.tasks = (*earlier, self._with_features(last, repeatable(data)))

    def _with_features(self, task: Task, data: Data) -> Task:
        """The task with where the activations of its neurons lie, which tells it from others."""
        with task.inference(self.model, self.head, masked=True):
            found = TaskFeatures.of(self.model, task.slice, data)
        by_features, by_energy = 0.0, 0.0
        for earlier in self.tasks:
            if earlier.name == task.name or earlier.features is None:
                continue
            with earlier.inference(self.model, self.head, masked=True):
                apart = earlier.features.separates(self.model, earlier.slice, data)
            by_features, by_energy = by_features + apart[0], by_energy + apart[1]
        return replace(task, features=replace(found, separation=(by_features, by_energy)))

    def _scores(self, inputs: Any) -> list[Tensor]:
        """The scores that each task gives, ``[samples, classes]``."""
        scores = []
        for position in range(len(self.tasks)):
            with self.task(position):
                scores.append(class_scores(run(self.model, inputs, 0)))
        return scores

    def _entropies(self, inputs: Any) -> Tensor:
        """Of the outputs of each task, ``[tasks, samples]``."""
        scored = zip(self.tasks, self._scores(inputs), strict=True)
        return torch.stack([entropy(scores, len(task.classes)) for task, scores in scored])

    def _energies(self, inputs: Any) -> Tensor:
        """Of the outputs of each task, standardised, ``[tasks, samples]``."""
        scored = zip(self.tasks, self._scores(inputs), strict=True)
        return torch.stack([self._features(task).energy_score(scores) for task, scores in scored])

    def _distances(self, inputs: Any) -> Tensor:
        """How far the samples are from those of each task, standardised, ``[tasks, samples]``."""
        samples = samples_in(inputs, 0)
        found = []
        for position, task in enumerate(self.tasks):
            with self.task(position, masked=True):
                _, activations = pooled(self.model, task.slice, inputs, samples)
            found.append(self._features(task).score(activations))
        return torch.stack(found)

    def _features(self, task: Task) -> TaskFeatures:
        if task.features is None:
            raise ArgumentError(
                f"the data of {task.name!r} was not given, so that its features are not known; "
                'use by="entropy", or give data='
            )
        return task.features
