"""Means, covariances and Fisher information of every group, from one pass."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import as_computed, counted_batches, first_batch, shared_data
from nss_prune.core.draws import Draws
from nss_prune.core.models import Forward, call_model, device_of, evaluation, run
from nss_prune.core.outputs import Outputs, outputs_of
from nss_prune.core.processes import agreed, summed, total_by_key
from nss_prune.core.views import views_of
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.statistics.capture import Reading, Watcher
from nss_prune.statistics.consumers import ConsumerSums
from nss_prune.statistics.covariance import add_products
from nss_prune.statistics.moments import Moments, add_moments_over_processes
from nss_prune.statistics.positions import by_size


@dataclass
class Sensitivity:
    """What one pass adds up for a group.

    Attributes:
        read: Mean and covariance of the inputs of its consumers.
        information: Σ over samples and positions of g gᵀ, ``[neurons, neurons]``, float64, where g
            is the gradient by an activation, of all consumers of this activation together.
        effects: Σ over samples of e², e f and f², where e = Σ g x and f = Σ g over positions and
            consumers, float64 ``[3, neurons]``.
        samples: Number of samples, each of their augmented copies counted.
    """

    read: Moments
    information: Tensor
    effects: Tensor
    samples: int = 0

    @property
    def inputs_per_sample(self) -> float:
        """Different activations that consumers receive from one sample."""
        return self.read.samples / self.samples


@agreed()
def sensitivities(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    *,
    seed: int = 0,
    reads: ConsumerSums | None = None,
    outputs: Outputs | None = None,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> dict[str, Sensitivity]:
    """Layer -> its sums, see :func:`nss_prune.allocation.elimination.eliminations`."""
    views = views_of(data)
    if outputs is None:
        first, data = first_batch(data)
        shown = [first] if isinstance(data, Iterator) else data
        outputs = outputs_of(model, shown, forward=forward, progress=progress)
    data = shared_data(data)
    home = device_of(model)
    found = {group.name: _nothing(group.size, views, home) for group in groups}
    added = {} if reads is None else {g.name: name for g in groups if (name := sole_consumer(g))}
    beside = contextlib.nullcontext if reads is None else reads.watching
    with evaluation(model), torch.enable_grad():
        for number, inputs, samples in counted_batches(model, data, progress, "sensitivity"):
            draws = Draws(inputs, seed)
            batch = _Batch(draws)
            watcher = Watcher(groups, samples, batch.add)
            with watcher.attached(model), beside(samples):
                given = run(model, inputs, number, forward)
                batch.expect(watcher.readings)
                outputs.drawn_loss(given, draws).backward()
            for name in batch.reached:
                batch.pour(name, found[name], samples, add_read=name not in added)
    _add_over_processes(found, added)
    found = {name: sums for name, sums in found.items() if sums.samples}
    if reads is not None:
        reads.add_over_processes()
        for name, consumer in added.items():
            if name in found:
                found[name].read = reads.moments(consumer)
    return found


def _nothing(neurons: int, views: int, device: torch.device) -> Sensitivity:
    zeros = torch.zeros(neurons + 3, neurons, dtype=torch.float64, device=device)
    return Sensitivity(Moments(neurons, 1, views, device), zeros[3:], zeros[:3])


def _add_over_processes(found: Mapping[str, Sensitivity], added: Collection[str]) -> None:
    """Replace what was added here by what was added in all processes.

    Args:
        added: Groups whose consumers' inputs are summed elsewhere.
    """
    samples = total_by_key({number: sums.samples for number, sums in enumerate(found.values())})
    for count, sums in zip(samples.values(), found.values(), strict=True):
        sums.samples = count
    summed([sums for each in found.values() for sums in (each.information, each.effects)])
    add_moments_over_processes([sums.read for name, sums in found.items() if name not in added])


class _Batch:
    """The gradients of one batch, of consumers of the same activation together.

    What a neuron does, it does in all consumers at once: their gradients are added up before they
    are squared. Where consumers receive different activations of it, such as a map and its
    average, each activation has a gradient of its own.
    """

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.reached: dict[str, list[Tensor]] = {}
        self._source: dict[int, int] = {}
        self._missing: Counter[int] = Counter()
        self._activations: dict[int, Reading] = {}
        self._gradients: dict[int, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._inputs: dict[str, list[int]] = {}

    def expect(self, readings: Sequence[Reading]) -> None:
        """Find the readings that are of the same activation; their gradients are still to come."""
        known: dict[tuple[Any, ...], list[int]] = {}
        for position, reading in enumerate(readings):
            values = reading.activation
            print_of = (reading.group, reading.shape, float(values.sum(dtype=torch.float64)))
            same = (
                i for i in known.get(print_of, ()) if torch.equal(readings[i].activation, values)
            )
            source = next(same, position)
            if source == position:
                known.setdefault(print_of, []).append(position)
                self._activations[position] = reading
            self._source[id(reading)] = source
            self._missing[source] += 1

    def add(self, reading: Reading, gradient: Tensor) -> None:
        """Add the gradient of one consumer, ``[samples, neurons, positions]``."""
        source, gradient = self._source[id(reading)], as_computed(gradient)
        known = self._gradients.pop(source, None)
        total = gradient if known is None else known + gradient
        self._missing[source] -= 1
        if self._missing[source]:
            self._gradients[source] = total
        else:
            self._finish(source, total)

    def _finish(self, source: int, gradient: Tensor) -> None:
        reading = self._activations[source]
        activation, name = as_computed(reading.activation), reading.group
        effect = (activation * gradient).sum(2).double()
        sums = torch.stack([effect, gradient.sum(2).double()])
        self.reached.setdefault(name, []).append(sums)
        rows = by_size(gradient, self.draws).transpose(0, 1).flatten(1)
        self._rows.setdefault(name, []).append(rows)
        self._inputs.setdefault(name, []).append(source)

    def pour(self, name: str, into: Sensitivity, samples: int, *, add_read: bool) -> None:
        """Add the batch to the sums of a group."""
        effect, total = torch.stack(self.reached[name]).sum(0)
        into.effects += torch.stack([effect**2, effect * total, total**2]).sum(1)
        for rows in self._rows.pop(name):
            add_products(into.information, rows)
        for source in self._inputs.pop(name):
            reading = self._activations.pop(source)
            if add_read:
                into.read.add(as_computed(reading.activation), reading.shape)
        into.samples += samples


def sole_consumer(group: NeuronGroup) -> str | None:
    """The one layer that reads the neurons, where it reads nothing else and each as a channel."""
    if len(group.consumers) != 1:
        return None
    (consumer,) = group.consumers
    neurons = torch.arange(group.size)
    alike = consumer.width == group.size and consumer.channels.equal(neurons)
    return consumer.name if alike and consumer.neurons.equal(neurons) else None
