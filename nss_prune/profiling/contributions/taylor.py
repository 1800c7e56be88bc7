"""First-order Taylor contribution (Molchanov et al., CVPR 2019, Eq. 8, on activations)."""

from __future__ import annotations

from torch import Tensor


class Taylor:
    """Squared first-order change of the loss when a neuron is zeroed.

    The change is summed over all positions and consumers of a sample before it is squared, and the
    squares are averaged over the samples: mean_x (Σ a · ∂L/∂a)².
    """

    name = "taylor"
    needs_gradient = True

    def gather(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """Sum of activation times gradient over positions, ``[1, samples, neurons]``."""
        assert gradient is not None
        return (activation * gradient).sum(2).unsqueeze(0)

    def per_sample(self, gathered: Tensor, positions: int) -> Tensor:
        """The square, ``[1, samples, neurons]``."""
        return gathered.double().square()

    def score(self, means: Tensor) -> Tensor:
        """The mean square, ``[categories, neurons]``."""
        return means[0]
