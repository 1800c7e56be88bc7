"""What a batch contributes to the statistics of the metrics, in a plain pass or with references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import as_computed
from nss_prune.core.models import Forward, run
from nss_prune.core.nested import tensors_in
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.profiling.contributions.deeplift import (
    count_references,
    difference,
    with_reference,
)
from nss_prune.profiling.contributions.protocol import Contribution
from nss_prune.profiling.contributions.rescale import RescaleRule
from nss_prune.statistics.capture import Reading, Watcher


class BatchStatistics:
    """What a batch contributes, gathered over all consumers before it counts by sample."""

    def __init__(self, metrics: Sequence[Contribution]) -> None:
        self.metrics = metrics
        self._gathered: dict[tuple[Any, str], Tensor] = {}
        self._positions: dict[str, int] = {}
        # Metrics that share a gather function (average, variance, ensemble) share its result.
        self._gathers = {type(metric).gather: metric.gather for metric in metrics}

    def add(self, reading: Reading, gradient: Tensor | None) -> None:
        """Gather one reading with its gradient, both ``[samples, neurons, positions]``."""
        activation = as_computed(reading.activation)
        gradient = None if gradient is None else as_computed(gradient)
        for function, gather in self._gathers.items():
            key = (function, reading.group)
            values = gather(activation, gradient)
            known = self._gathered.get(key)
            self._gathered[key] = values if known is None else known + values
        seen = self._positions.get(reading.group, 0)
        self._positions[reading.group] = seen + activation.shape[2]

    def per_sample(self, metric: Contribution, group: str) -> Tensor | None:
        """``[statistics, samples, neurons]``, or None where nothing was gathered."""
        gathered = self._gathered.get((type(metric).gather, group))
        return None if gathered is None else metric.per_sample(gathered, self._positions[group])


def without_gradient(
    metrics: Sequence[Contribution], readings: Sequence[Reading]
) -> BatchStatistics:
    """What the readings of a batch contribute to the metrics that need no gradient."""
    statistics = BatchStatistics([metric for metric in metrics if not metric.needs_gradient])
    for reading in readings:
        statistics.add(reading, None)
    return statistics


def against_reference(
    model: nn.Module,
    inputs: Any,
    baseline: Any,
    groups: Sequence[NeuronGroup],
    metrics: Sequence[Contribution],
    explained: Callable[[Any, int], Tensor],
    forward: Forward,
    number: int,
) -> tuple[BatchStatistics, set[str]]:
    """Differences and multipliers of a batch against its references, in a pass of its own.

    Args:
        explained: Function of the outputs (of samples, then references) and the number of
            samples that gives what is explained.
        number: Of the batch, for messages.

    Returns:
        What was gathered, and the functions that kept their plain gradient.
    """
    samples = len(tensors_in(inputs)[0])
    gathered = BatchStatistics(metrics)

    def gather(reading: Reading, gradient: Tensor) -> None:
        differences = replace(reading, activation=difference(reading.activation, samples))
        gathered.add(differences, gradient[:samples])

    references = count_references(inputs, baseline)
    watcher = Watcher(groups, samples + references, gather)
    rule = RescaleRule(samples, references)
    with watcher.attached(model), torch.enable_grad(), rule:
        outputs = run(model, with_reference(inputs, baseline, references), number, forward)
        watcher.readings.clear()
        explained(outputs, samples).backward()
    return gathered, rule.uncovered
