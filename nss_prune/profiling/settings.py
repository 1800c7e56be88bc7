"""The arguments of a profile, by what they are for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from nss_prune.core.batches import first_batch
from nss_prune.core.models import Forward, device_of
from nss_prune.core.outputs import OutputsSpec, outputs_of
from nss_prune.core.processes import processes
from nss_prune.errors import ArgumentError
from nss_prune.profiling.baseline import mean_inputs
from nss_prune.profiling.categories import Categories, check_categories
from nss_prune.profiling.contributions.protocol import Contribution, metric_named, needs_reference
from nss_prune.profiling.described import Loss, Meaning, by_batch
from nss_prune.profiling.similarity import Landscape, Ranking, check_interval, check_ranking

Metrics = Sequence[str | Contribution]
"""Contribution metrics, by name or as objects."""


@dataclass(frozen=True)
class Comparison:
    """What is computed of every neuron.

    Attributes:
        metrics: Contribution metrics, by name or as objects, all from the same pass.
        categories: "labels", "predicted", None for a single category, or a function of
            (inputs, labels, outputs) that gives an integer for each sample. Categories with
            fewer than 8 samples join others, see ``Profile.notes``.
        landscape: How observations are made of activations.
        interval: Neurons that Algorithm 1 adds at a time.
        ranking: Neurons are ranked by the "magnitude" of their contributions, or "signed", from
            the largest to the most negative.

    Raises:
        ArgumentError: One of them is outside what it may be.
    """

    metrics: Metrics
    categories: Categories
    landscape: Landscape
    interval: int
    ranking: Ranking

    def __post_init__(self) -> None:
        check_categories(self.categories)
        if not self.chosen:
            raise ArgumentError("metrics is empty; give at least one, for example ('taylor',)")
        check_interval(self.interval)
        check_ranking(self.ranking)

    @functools.cached_property
    def chosen(self) -> list[Contribution]:
        """The metrics as objects."""
        metrics = [self.metrics] if isinstance(self.metrics, str) else self.metrics
        return [metric_named(metric) for metric in metrics]


@dataclass(frozen=True)
class Objective:
    """What the contributions are contributions to.

    Attributes:
        loss: Function of (outputs, labels), summed over the samples or one value for each. By
            default by ``outputs``: cross entropy, binary cross entropy with logits, or half the
            squared error in units of the variance of the outputs.
        outputs: What the outputs mean: "classes" (softmax), "labels" (sigmoids), "values", a list
            or dict of these where there are several, a function that returns the tensors to keep;
            None for what the outputs and labels of the first batch decide, see
            :data:`nss_prune.core.outputs.OutputsSpec`.
        forward: Function of (model, inputs) that gives the outputs, for the data and the example.
        baseline: The reference of "deeplift": "zeros", "mean" (of the data, in a pass before),
            or a tensor that broadcasts to one sample, nested like the inputs where these are.
    """

    loss: Loss | None
    outputs: OutputsSpec
    forward: Forward
    baseline: Any

    def meaning(
        self,
        model: nn.Module,
        data: Iterable[Any],
        metrics: Iterable[Contribution],
        categories: Categories,
    ) -> tuple[Iterable[Any], Meaning]:
        """The data with all of its batches, and what the outputs mean by one of them.

        Several processes find that out together before the pass, where it matters.
        """
        gradients = any(metric.needs_gradient for metric in metrics)
        matters = self.loss is None and (gradients or categories == "predicted")
        if processes() == 1 or not matters:
            return data, by_batch(model, data, self.outputs, self.forward)
        first, data = first_batch(data, device_of(model))
        shown = [first] if isinstance(data, Iterator) else data
        found = outputs_of(model, shown, self.outputs, forward=self.forward)
        return data, lambda outputs, labels: found

    def reference(self, data: Iterable[Any], metrics: Iterable[Contribution]) -> Any:
        """The baseline that the metrics need, computed of the data where it is their mean."""
        wanted = any(needs_reference(metric) for metric in metrics)
        named_mean = isinstance(self.baseline, str) and self.baseline == "mean"
        return mean_inputs(data) if wanted and named_mean else self.baseline


@dataclass(frozen=True)
class Upkeep:
    """What a pass may take, keeps and shows.

    Attributes:
        memory_limit: Bytes for the sums of the categories that are open at a time. Data with
            more categories is read in their order, or several times. With "flat", half of it
            is for the activations of layers with positions; where these take more, an even draw
            of each category's samples is compared, see ``Profile.notes``.
        keep_statistics: Keep the sums for ``Profile.merge``, 8 Σ neurons² bytes a category (and
            with "flat" the activations).
        keep_readers: Keep the mean and covariance of what each consumer reads, to fold with: 8 C²
            bytes for a consumer of C channels.
        progress: Show a progress bar; by default when stderr is a terminal.
    """

    memory_limit: int
    keep_statistics: bool
    keep_readers: bool
    progress: bool | None
