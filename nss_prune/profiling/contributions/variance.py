"""Variance of the activation (paper, section 2.3, metric 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from nss_prune.profiling.contributions.average import Average


class Variance(Average):
    """Variance of the activation over all observations: E[a²] - E[a]².

    An observation is what a neuron emits for one sample at one position to one of its readers,
    so that a neuron whose maps differ within the samples varies, even where their averages are
    all the same. Without positions it is the paper's Σ (f_n(x) - avg_n)² / |D|.
    """

    name = "var"

    def gather(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """Sums of the activation and of its square over positions, ``[2, samples, neurons]``.

        In float64: their difference is small against them where the mean is large.
        """
        square = torch.linalg.vector_norm(activation, dim=2, dtype=torch.float64).square()
        return torch.stack([activation.sum(2, dtype=torch.float64), square])

    def per_sample(self, gathered: Tensor, positions: int) -> Tensor:
        """Means over the positions of the activation and its square, ``[2, samples, neurons]``."""
        return gathered / positions

    def score(self, means: Tensor) -> Tensor:
        """The variance, ``[categories, neurons]``."""
        return (means[1] - means[0].square()).clamp_min(0)
