"""Average of the activation (paper, section 2.3, metric 1)."""

from __future__ import annotations

from torch import Tensor


class Average:
    """Mean activation: Σ f_n(x) / |D|.

    What a neuron emits for a sample, f_n(x), is the mean over its positions and consumers.
    """

    name = "avg"
    needs_gradient = False

    def gather(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """Sum over positions, ``[1, samples, neurons]``."""
        return activation.sum(2).unsqueeze(0)

    def per_sample(self, gathered: Tensor, positions: int) -> Tensor:
        """f_n(x), ``[1, samples, neurons]``."""
        return gathered.double() / positions

    def score(self, means: Tensor) -> Tensor:
        """The mean, ``[categories, neurons]``."""
        return means[0]
