"""Ensemble of average and variance (paper, section 2.3, metric 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from nss_prune.profiling.contributions.variance import Variance


class Ensemble(Variance):
    """Sum of average and variance, each scaled to [0, 1] over the neurons of a layer.

    The variance is that of all observations, see :class:`Variance`.
    """

    name = "ens"

    def score(self, means: Tensor) -> Tensor:
        """min-max(avg) + min-max(var), ``[categories, neurons]``, in [0, 2]."""
        return scaled(means[0]) + scaled(super().score(means))


def scaled(values: Tensor) -> Tensor:
    """Min-max over the last axis; zeros where all are equal."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
