"""Variance of the activation (paper, section 2.3, metric 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from nss_prune.profiling.contributions.average import Average


class Variance(Average):
    """Variance of the activation over all observations: E[a²] - E[a]².

    An observation is what a neuron emits for one sample at one position to one of its consumers,
    so that a neuron whose maps differ within the samples varies, even where their averages are
    all the same. Without positions it is the paper's Σ (f_n(x) - avg_n)² / |D|.
    """

    name = "var"

    def gather(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """Sums of the activation and of its square over positions, ``[2, samples, neurons]``.

        In float64 and by way of deviations from the sample's mean, because the difference of the
        two is small against them where the mean is large.
        """
        positions = activation.shape[2]
        mean = activation.mean(2, keepdim=True)
        deviations = activation - mean
        shift = mean[:, :, 0].double()
        rest = deviations.sum(2).double()  # zero but for the rounding of the mean
        square = deviations.square().sum(2).double() + shift * (2 * rest + positions * shift)
        return torch.stack([positions * shift + rest, square])

    def per_sample(self, gathered: Tensor, positions: int) -> Tensor:
        """Means over the positions of the activation and its square, ``[2, samples, neurons]``."""
        return gathered / positions

    def score(self, means: Tensor) -> Tensor:
        """The variance, ``[categories, neurons]``."""
        return (means[1] - means[0].square()).clamp_min(0)
