"""Strategies of one's own that rank neurons by the inputs of the layers that consume them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune import Slice
from nss_prune.allocation.budget import Limits, solve
from nss_prune.core.models import submodule
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.pruner.strategy import Evidence, Target
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.consumers import consumer_statistics
from nss_prune.statistics.moments import ConsumerStatistics

PER_TOKEN = (nn.LayerNorm, nn.GroupNorm)
"""Norms over the neurons of a residual stream, which is no hidden layer."""


@dataclass(frozen=True)
class RankedByInputs:
    """Ranks the hidden neurons of every layer by one number of their activations.

    Heads of attention and the residual stream of a transformer are left alone: the methods that
    derive from this are about hidden layers.

    Attributes:
        data: Batches of (inputs, labels); labels are not used.
        together: One threshold for all layers; otherwise the same share of each layer.
    """

    data: Iterable[Any]
    together: bool

    def score(self, statistics: ConsumerStatistics) -> Tensor:
        """The number of each of a consumer's input channels, ``[channels]``."""
        raise NotImplementedError

    def observe(self, subject: Subject) -> Evidence:
        """Means and covariances, from one pass without gradients."""
        subject = subject.readable()
        others = {
            group.name: "no hidden layer" for group in subject.groups if not hidden(subject, group)
        }
        neurons = subject.neurons.without(others)
        statistics = consumer_statistics(
            subject.model, self.data, neurons.groups, progress=False, **subject.calling
        )
        return Evidence(neurons=neurons, statistics=statistics)

    def select(self, subject: Subject, evidence: Evidence, target: Target, limits: Limits) -> Slice:
        """The neurons that rank highest within the budget."""
        assert target.budget is not None
        assert target.share is not None
        scores = {group.name: self._of_group(group, evidence) for group in subject.groups}
        if not self.together:
            scores = {name: shares_below(values) for name, values in scores.items()}
        critical, _ = solve(subject.groups, scores.__getitem__, target.budget, target.share, limits)
        return critical

    def _of_group(self, group: NeuronGroup, evidence: Evidence) -> Tensor:
        """The mean over the channels that carry a neuron, ``[neurons]``."""
        total, count = (torch.zeros(group.size, dtype=torch.float64) for _ in range(2))
        assert evidence.statistics is not None
        for member in group.consumers:
            if member.name in evidence.statistics:
                values = self.score(evidence.statistics[member.name]).cpu().double()
                total.index_add_(0, member.neurons, values[member.channels])
                count.index_add_(0, member.neurons, torch.ones_like(values[member.channels]))
        return total / count.clamp(min=1)


def hidden(subject: Subject, group: NeuronGroup) -> bool:
    """Whether the neurons are channels that no norm mixes on the way to their consumers."""
    modules = dict(subject.model.named_modules())
    norms = (submodule(subject.model, m.name) for m in group.members if m.name in modules)
    return group.has_channels and not any(isinstance(module, PER_TOKEN) for module in norms)


def variances(statistics: ConsumerStatistics) -> Tensor:
    """The variance of each channel, ``[channels]``; of a wide flattened map, its neuron's."""
    return statistics.covariance.diagonal().repeat_interleave(statistics.repeats)


def shares_below(scores: Tensor) -> Tensor:
    """The share of the layer's neurons that rank lower: a threshold takes as much of each layer."""
    return (scores.argsort(stable=True).argsort() + 0.5) / len(scores)
