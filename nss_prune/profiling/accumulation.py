"""Batches in, sums out: what one pass adds up to for every group and category."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import as_computed, samples_in
from nss_prune.core.models import Forward, call_model, run
from nss_prune.core.thread_state import outside_inference_mode
from nss_prune.errors import NumericalError
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.profiling.categories import Categories, assign, count_used
from nss_prune.profiling.contributions.protocol import Contribution, needs_reference
from nss_prune.profiling.described import Described, Meaning, by_labels
from nss_prune.profiling.described import Loss as Loss  # what a Collector takes, for its callers
from nss_prune.profiling.gathering import BatchStatistics, against_reference, without_gradient
from nss_prune.profiling.similarity import Landscape, LandscapeSums
from nss_prune.profiling.sums import CategorySums, GroupSums, draw_within
from nss_prune.statistics.capture import Reading, Watcher

Beside = Callable[[int], contextlib.AbstractContextManager[None]]


def alone(samples: int) -> contextlib.AbstractContextManager[None]:
    """A context in which nothing else is done."""
    return contextlib.nullcontext()


class Collector:
    """Streams batches into sums; holds no batch longer than it is worked on.

    Args:
        groups: The neurons.
        metrics: Contribution metrics.
        landscape: How observations are made of activations.
        categories: Which category a sample counts for.
        loss: Function of (outputs, labels); by default the likelihood of the labels by what the
            outputs mean.
        device: Where the sums are kept: that of the model.
        baseline: The reference of metrics that compare with one.
        beside: Function of the number of samples that gives a context, in which each batch is run
            for the first time.
        meaning: What the outputs mean, asked for the first batch, and only where it matters.
        forward: Calls the model on the inputs of a batch.
        flat_limit: Bytes for the activations that landscapes of "flat" features keep.

    Attributes:
        described: The outputs as what they mean.
        used: Number of samples that count for a category, each counted once.
        unused: Number of samples that count for none.
        sums: Category -> its sums.
        counts_as: Category -> the one under which its samples are summed, where they differ.
        uncovered: Functions that kept their plain gradient where a multiplier was wanted.
    """

    def __init__(
        self,
        groups: Sequence[NeuronGroup],
        metrics: Sequence[Contribution],
        landscape: Landscape,
        categories: Categories,
        loss: Loss | None = None,
        device: torch.device | str = "cpu",
        baseline: Any = "zeros",
        beside: Beside = alone,
        meaning: Meaning = by_labels,
        forward: Forward = call_model,
        flat_limit: float = math.inf,
    ) -> None:
        self.groups = groups
        self.beside = beside
        self.described = Described(loss, meaning)
        self.forward = forward
        self.metrics = metrics
        self.landscape = landscape
        self.categories = categories
        self.device = torch.device(device)
        self.sums: dict[int, CategorySums] = {}
        self.counts_as: dict[int, int] = {}
        self.baseline = baseline
        self.uncovered: set[str] = set()
        self.flat_limit = flat_limit
        self.used = self.unused = 0
        self._used: list[CategorySums] = []

    def reuse(self, sums: CategorySums) -> None:
        """Take back sums that are no longer needed, for the next category.

        To allocate the large ones anew for each category leaves the heap in pieces, which costs
        more memory than the sums themselves.
        """
        self._used.append(sums)

    def empty(self) -> CategorySums:
        """Sums of a category without samples."""
        if self._used:
            return self._used.pop().clear()
        nothing = torch.zeros(1, 1, 1)
        statistics = {
            metric.name: len(metric.per_sample(metric.gather(nothing, nothing), 1))
            for metric in self.metrics
        }
        return CategorySums(
            groups={
                group.name: GroupSums(
                    LandscapeSums.zeros(group.size, self.device),
                    {
                        name: torch.zeros(
                            count, group.size, dtype=torch.float64, device=self.device
                        )
                        for name, count in statistics.items()
                    },
                )
                for group in self.groups
            }
        )

    @outside_inference_mode
    def add(
        self,
        model: nn.Module,
        inputs: Any,
        labels: Any,
        number: int,
        admitted: Collection[int] | None = None,
    ) -> None:
        """Run one batch and add what it shows.

        Args:
            number: Of the batch, for messages.
            admitted: Categories to add to; all by default.

        Raises:
            DataError, NumericalError: The batch cannot be used.
        """
        samples = samples_in(inputs, number)
        compared = [metric for metric in self.metrics if needs_reference(metric)]
        with_gradient = [
            metric for metric in self.metrics if metric.needs_gradient and metric not in compared
        ]
        gathered = BatchStatistics(with_gradient)
        watcher = Watcher(self.groups, samples, gathered.add if with_gradient else None)
        with (
            watcher.attached(model),
            torch.set_grad_enabled(bool(with_gradient)),
            self.beside(samples),
        ):
            outputs = run(model, inputs, number, self.forward)
        with torch.set_grad_enabled(bool(with_gradient)):
            membership = self._membership(inputs, labels, outputs, samples)
            if admitted is None:
                self.count(membership, samples)
            else:
                membership = {c: membership[c] for c in membership if c in admitted}
            membership = self._joined(membership)
            for category in membership:
                if category not in self.sums:
                    self.sums[category] = self.empty()
            self._add_landscapes(watcher.readings, membership)
            if self.landscape.features == "flat":
                draw_within(self.sums.values(), self.flat_limit)
            self._add_statistics(without_gradient(self.metrics, watcher.readings), membership)
            if with_gradient:
                watcher.readings.clear()
                self.described.loss(outputs, labels).backward()
                self._add_statistics(gathered, membership)
        if compared:
            if self.described.explains_meaning(labels):
                self.described.outputs(outputs, labels)  # of the samples without their references
            differences = self._differences(model, inputs, labels, compared, number)
            self._add_statistics(differences, membership)
        for category, indices in membership.items():
            self.sums[category].samples += len(indices)

    def count(self, membership: Mapping[int, Tensor], samples: int) -> None:
        """Count the samples of a batch that belong to a category, and those that do not."""
        used = count_used(membership)
        self.used += used
        self.unused += samples - used

    def join(self, part: Sequence[int]) -> None:
        """Sum all categories of a part under its first from now on, those summed so far too."""
        first = part[0]
        self.counts_as.update(dict.fromkeys(part[1:], first))
        for category in part[1:]:
            if category in self.sums:
                other = self.sums.pop(category)
                self.sums[first] = self.sums[first] + other if first in self.sums else other

    def _joined(self, membership: Mapping[int, Tensor]) -> dict[int, Tensor]:
        found: dict[int, list[Tensor]] = {}
        for category, indices in membership.items():
            found.setdefault(self.counts_as.get(category, category), []).append(indices)
        return {category: torch.cat(parts) for category, parts in found.items()}

    def _membership(
        self, inputs: Any, labels: Any, outputs: Any, samples: int
    ) -> dict[int, Tensor]:
        """Category -> its samples."""
        if self.categories != "predicted":
            return assign(self.categories, inputs, labels, outputs, samples)
        predicted = self.described.predictions(outputs, labels)
        return assign("labels", inputs, predicted, outputs, samples)

    def _differences(
        self,
        model: nn.Module,
        inputs: Any,
        labels: Any,
        metrics: Sequence[Contribution],
        number: int,
    ) -> BatchStatistics:
        """Differences and multipliers of the batch against its references."""
        gathered, uncovered = against_reference(
            model,
            inputs,
            self.baseline,
            self.groups,
            metrics,
            lambda outputs, samples: self.described.explained(outputs, labels, samples),
            self.forward,
            number,
        )
        self.uncovered |= uncovered
        return gathered

    def _add_landscapes(
        self, readings: Sequence[Reading], membership: Mapping[int, Tensor]
    ) -> None:
        by_group: dict[str, list[Tensor]] = {group.name: [] for group in self.groups}
        for reading in readings:
            values = self.landscape.observations(as_computed(reading.activation), reading.shape)
            if not torch.isfinite(values.sum(dtype=torch.float64)):
                raise NumericalError(
                    f"what reads {reading.group} reads NaN or infinite values; check the data "
                    "and the model's weights"
                )
            by_group[reading.group].append(values)
        for group in self.groups:
            observed = by_group[group.name]
            for category, indices in membership.items():
                sums = self.sums[category].groups[group.name]
                sums.landscape.add(self.landscape, [_of_samples(v, indices) for v in observed])

    def _add_statistics(self, gathered: BatchStatistics, membership: Mapping[int, Tensor]) -> None:
        for metric in gathered.metrics:
            for group in self.groups:
                values = gathered.per_sample(metric, group.name)
                if values is None:  # no gradient reached what reads the group
                    continue
                if not torch.isfinite(values.sum()):
                    raise NumericalError(
                        f"{metric.name} of {group.name} is NaN or infinite; check the data, the "
                        "loss and the model's weights"
                    )
                for category, indices in membership.items():
                    sums = self.sums[category].groups[group.name].statistics
                    sums[metric.name] += values[:, indices.to(values.device)].sum(1)


def _of_samples(observed: Tensor, indices: Tensor) -> Tensor:
    if len(indices) == observed.shape[1]:
        return observed
    return observed.index_select(1, indices.to(observed.device))
