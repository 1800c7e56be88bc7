"""Variance-Based Pruning (Berisha, Mehnert, Condurache, ICCV 2025, arXiv 2507.12988).

Hidden neurons whose activation, after the nonlinearity, varies least over the calibration data go
first, over all layers together; what they are in the mean goes into the bias of the next layer:
b' = b + W_P μ_P. Deviations: the paper prunes the MLPs of transformers; here every hidden layer
that NSSPruner finds is ranked, convolutions too, where a padded border is not told apart. A neuron
with several consumers, or of several channels, has the mean of their variances. Where a BatchNorm
follows a layer without a bias, its running mean takes the shift.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.ranked import RankedByInputs, variances
from nss_prune import Slice
from nss_prune.compensation.folding import apply
from nss_prune.compensation.solve import ConsumerFold
from nss_prune.core.models import submodule
from nss_prune.pruner.repair import Repaired
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.moments import ConsumerStatistics


class ActivationVariance(RankedByInputs):
    """Ranks by variance."""

    def score(self, statistics: ConsumerStatistics) -> Tensor:
        """The variance of each channel, ``[channels]``."""
        return variances(statistics)


class MeanShift:
    """Moves the mean of what is removed into the bias of the layer that consumed it."""

    def observe(self, subject: Subject, evidence: Evidence) -> Any:
        """The strategy's own statistics."""
        return evidence.statistics

    def before(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Shift the biases."""
        folds = {}
        for name, removed in removed_inputs(chosen):
            module, statistics = submodule(subject.model, name), seen[name]
            missing = statistics.mean * removed.to(statistics.mean.device)
            folds[name] = ConsumerFold(
                constant=output_of_constant(module, missing), norm=statistics.norm
            )
        apply(subject.model, folds)
        return Repaired(changed=tuple(folds))

    def after(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Nothing more."""
        return Repaired()


def removed_inputs(chosen: Slice) -> list[tuple[str, Tensor]]:
    """Consumers that lose inputs, each with True for the channels that go, ``[channels]``."""
    found = []
    for (name, side), (member, channels) in chosen.removed_channels().items():
        if side == "in":
            removed = torch.zeros(member.width, dtype=torch.bool)
            removed[channels] = True
            found.append((name, removed))
    return found


def by_input(module: nn.Module) -> Tensor:
    """How each output of a Linear or convolution depends on inputs that are the same everywhere.

    Returns float64 ``[outputs, inputs]``: kernels are summed, and zero between channel groups.
    """
    weight = module.get_parameter("weight").detach().double()
    summed = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
    groups = getattr(module, "groups", 1)
    return torch.block_diag(*summed.chunk(groups)) if groups > 1 else summed


def output_of_constant(module: nn.Module, values: Tensor) -> Tensor:
    """What constant inputs ``[channels]`` add to each output, float64 ``[outputs]``."""
    return by_input(module) @ values.double()
