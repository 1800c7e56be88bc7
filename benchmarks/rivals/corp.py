"""CORP, closed-form one-shot structured pruning (Zhang, Yang, arXiv 2602.05243), hidden layers.

Hidden channels are ranked by their activation energy E[h²], and those with the least go. What
remains makes up for them: h_P ≈ B h_S + c by ridge regression on the calibration data, B = Σ_PS
(Σ_SS + λI)⁻¹ and c = μ_P − B μ_S, which is folded into the next layer: W_S' = W_S + W_P B and
b' = b + W_P c. Deviations: the paper also prunes the query and key dimensions of attention, which
NSSPruner does not; λ is a fixed share of the mean variance of what remains, so that it has no unit;
every hidden layer that NSSPruner finds is ranked, convolutions too. Grouped convolutions get c with
B = 0 alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.ranked import RankedByInputs, variances
from benchmarks.rivals.vbp import output_of_constant, removed_inputs
from nss_prune import Slice
from nss_prune.compensation.folding import apply
from nss_prune.compensation.solve import ConsumerFold
from nss_prune.core.models import submodule
from nss_prune.pruner.repair import Repaired
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.moments import ConsumerStatistics

PENALTY = 1e-3  # λ as a share of the mean variance of the channels that remain


class ActivationEnergy(RankedByInputs):
    """Ranks by E[h²]."""

    def score(self, statistics: ConsumerStatistics) -> Tensor:
        """The energy of each channel, ``[channels]``."""
        return variances(statistics) + statistics.mean.square()


class RidgeCompensation:
    """Lets the remaining channels stand for those that were removed."""

    def observe(self, subject: Subject, evidence: Evidence) -> Any:
        """The strategy's own statistics."""
        return evidence.statistics

    def before(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Change the weights and biases of the consumers."""
        folds = {
            name: compensated(submodule(subject.model, name), seen[name], removed)
            for name, removed in removed_inputs(chosen)
        }
        apply(subject.model, folds)
        return Repaired(changed=tuple(folds))

    def after(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Nothing more."""
        return Repaired()


def compensated(module: nn.Module, statistics: ConsumerStatistics, removed: Tensor) -> ConsumerFold:
    """How a consumer changes that loses some of its inputs.

    Args:
        removed: True for the channels that go, ``[channels]``.
    """
    weight = module.get_parameter("weight").detach()
    removed = removed.to(statistics.mean.device)
    constant = statistics.mean * removed
    new = None
    if getattr(module, "groups", 1) == 1:
        matrix = regression(statistics, removed)  # [channels, channels]
        constant = constant - matrix @ statistics.mean
        added = torch.einsum("op...,ps->os...", weight.double(), matrix)
        new = (weight.double() + added).to(weight)
    return ConsumerFold(
        weight=new, constant=output_of_constant(module, constant), norm=statistics.norm
    )


def regression(statistics: ConsumerStatistics, removed: Tensor) -> Tensor:
    """B as ``[channels, channels]``: zero but in the rows that go and the columns that remain.

    Of a wide flattened map B is the same at all positions, as its covariance is.
    """
    repeats = statistics.repeats
    gone = removed.view(-1, repeats).all(1)
    rows, columns = gone.nonzero()[:, 0], (~gone).nonzero()[:, 0]
    matrix = torch.zeros_like(statistics.covariance)
    if len(columns):
        known = statistics.covariance[columns][:, columns]
        cross = statistics.covariance[rows][:, columns]
        penalty = PENALTY * known.diagonal().mean() + torch.finfo(known.dtype).tiny
        eye = torch.eye(len(columns), dtype=known.dtype, device=known.device)
        found = torch.linalg.solve(known + penalty * eye, cross.T).T
        matrix[rows[:, None], columns] = found
    return torch.kron(matrix, torch.eye(repeats).to(matrix)) if repeats > 1 else matrix
