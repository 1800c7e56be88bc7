"""Variance of the activation (paper, section 2.3, metric 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from nss_prune.profiling.contributions.average import Average


class Variance(Average):
    """Variance of the activation: Σ (f_n(x) - avg_n)² / |D|."""

    name = "var"

    def per_sample(self, gathered: Tensor, positions: int) -> Tensor:
        """f_n(x) and its square, ``[2, samples, neurons]``."""
        emitted = gathered[0].double() / positions
        return torch.stack([emitted, emitted.square()])

    def score(self, means: Tensor) -> Tensor:
        """The variance, ``[categories, neurons]``."""
        return (means[1] - means[0].square()).clamp_min(0)
