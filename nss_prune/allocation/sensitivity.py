"""Means, covariances and Fisher information of every group, from one pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import as_computed, counted_batches
from nss_prune.core.models import evaluation, run
from nss_prune.core.outputs import class_scores, drawn_loss
from nss_prune.core.views import views_of
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.profiling.accumulation import alone
from nss_prune.statistics.capture import Reading, Watcher
from nss_prune.statistics.consumers import ConsumerSums
from nss_prune.statistics.moments import Moments, spaced


@dataclass
class Sensitivity:
    """What one pass adds up for a group.

    Attributes:
        read: Mean and covariance of what its readers read.
        information: Σ over samples and positions of g gᵀ, ``[neurons, neurons]``, float64.
        effects: Σ over samples of e², e f and f², where e = Σ g x and f = Σ g over positions and
            readers, float64 ``[3, neurons]``.
    """

    read: Moments
    information: Tensor
    effects: Tensor


def sensitivities(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    *,
    seed: int = 0,
    reads: ConsumerSums | None = None,
    progress: bool | None = None,
) -> dict[str, Sensitivity]:
    """Layer -> its sums, see :func:`nss_prune.allocation.elimination.eliminations`."""
    found: dict[str, Sensitivity] = {}
    sizes = {group.name: group.size for group in groups}
    effects: dict[str, Tensor] = {}
    added = {} if reads is None else {g.name: name for g in groups if (name := _sole_consumer(g))}

    def add(reading: Reading, gradient: Tensor) -> None:
        name = reading.group
        if name not in found:
            zeros = torch.zeros(
                sizes[name] + 3, sizes[name], dtype=torch.float64, device=gradient.device
            )
            found[name] = Sensitivity(Moments(views=views), zeros[3:], zeros[:3])
        activation, gradient = as_computed(reading.activation), as_computed(gradient)
        if name not in added:
            found[name].read.add(activation)
        _add_information(found[name].information, gradient)
        # Of all readers before they are squared: what a neuron does, it does in all of them.
        effects[name] = effects.get(name, 0) + _effects(activation, gradient)

    beside, views = alone if reads is None else reads.watching, views_of(data)
    generator = torch.Generator().manual_seed(seed)
    with evaluation(model), torch.enable_grad():
        for number, inputs, samples in counted_batches(model, data, progress, "divergence"):
            with Watcher(groups, samples, add).attached(model), beside(samples):
                scores = class_scores(run(model, inputs, number)).float()
                drawn_loss(scores, generator).backward()
            for name, (effect, total) in effects.items():
                squares = torch.stack([effect**2, effect * total, total**2])
                found[name].effects += squares.sum(1)
            effects.clear()
    if reads is not None:
        for name, reader in added.items():
            found[name].read = reads.moments(reader)
    return found


def _sole_consumer(group: NeuronGroup) -> str | None:
    """The one layer that reads the neurons, where it reads nothing else and each as a channel."""
    if len(group.readers) != 1:
        return None
    (reader,) = group.readers
    neurons = torch.arange(group.size)
    alike = reader.width == group.size and reader.channels.equal(neurons)
    return reader.name if alike and reader.neurons.equal(neurons) else None


def _add_information(total: Tensor, gradient: Tensor) -> None:
    """Add Σ g gᵀ over the samples and positions of ``[samples, neurons, positions]``."""
    seen = spaced(gradient, 2)
    by_neuron = seen.transpose(0, 1).flatten(1)
    total.add_(by_neuron @ by_neuron.T, alpha=gradient.shape[2] / seen.shape[2])


def _effects(activation: Tensor, gradient: Tensor) -> Tensor:
    """Σ_positions g x and Σ_positions g, ``[2, samples, neurons]``; the arguments are
    ``[samples, neurons, positions]``."""
    effect = (activation * gradient).sum(2).double()
    return torch.stack([effect, gradient.sum(2).double()])
