"""Backward elimination of the neurons of one group, cheapest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.allocation.sensitivity import Sensitivity, sensitivities
from nss_prune.core.models import Forward, call_model
from nss_prune.core.outputs import Outputs
from nss_prune.errors import NumericalError
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.statistics.consumers import ConsumerSums
from nss_prune.statistics.moments import ConsumerStatistics

TOO_WIDE = 4  # neurons for each independent observation: their covariances are noise
LEAST_SHRINKAGE = 1e-8  # a neuron that is dead, or predicted by others, has no precision otherwise
ROUNDS = 16  # a round eliminates as many neurons as are left, divided by this


@dataclass(frozen=True)
class Elimination:
    """Backward elimination of the neurons of a group, cheapest first.

    Attributes:
        order: Neurons, the first to go first, ``[neurons]``.
        divergence: D after each of them, in nats a sample, ``[neurons]``, float64.
        growth: How much larger errors are on new samples than on those that the neurons that stay
            were fitted to, ``[neurons]``; None for as large.
    """

    order: Tensor
    divergence: Tensor
    growth: Tensor | None = None

    @cached_property
    def slopes(self) -> Tensor:
        """:func:`slopes` of the divergence, ``[neurons]``."""
        return slopes(self.divergence)


def slopes(divergence: Tensor) -> Tensor:
    """What each neuron of an elimination adds on the lower convex hull of D, ``[neurons]``.

    A budget can only be met at the corners of the hull; between them all neurons count alike.
    """
    values = [0.0, *divergence.tolist()]
    corners: list[int] = []
    for here in range(len(values)):
        while len(corners) > 1 and _is_above(values, corners[-2], corners[-1], here):
            corners.pop()
        corners.append(here)
    steps = torch.empty_like(divergence)
    for left, right in itertools.pairwise(corners):
        steps[left:right] = (values[right] - values[left]) / (right - left)
    return steps


def _is_above(values: Sequence[float], left: int, middle: int, right: int) -> bool:
    """Whether the middle one of three points is on or above the line through the others."""
    rise = (values[right] - values[left]) * (middle - left)
    return (values[middle] - values[left]) * (right - left) >= rise


def eliminations(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    *,
    seed: int = 0,
    reads: ConsumerSums | None = None,
    outputs: Outputs | None = None,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> dict[str, Elimination]:
    """Layer -> its elimination, from one pass over the data; the model is left as found.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them; labels are not used.
        seed: For what is drawn at random.
        reads: To add the consumers' inputs to, in the same pass.
        outputs: What the outputs mean; found from the first batch by default.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        ArgumentError: It is not certain what the outputs mean; give ``outputs``.
        DataError: The data is empty, or the model refuses it.
        NumericalError: A consumer reads NaN or infinite values, or gets such gradients.
    """
    found = sensitivities(
        model, data, groups, seed=seed, reads=reads, outputs=outputs, forward=forward,
        progress=progress,
    )  # fmt: skip
    return {name: eliminated(name, found.pop(name)) for name in list(found)}  # its sums go


def eliminated(name: str, sums: Sensitivity) -> Elimination:
    """The elimination of one group.

    Raises:
        NumericalError: Its sums are NaN or infinite.
    """
    statistics = sums.read.statistics(name, (), None)
    if not torch.isfinite(sums.information.sum() + sums.effects.sum()):
        raise NumericalError(
            f"the gradients of what reads {name} are NaN or infinite; check the data and the "
            "model's weights"
        )
    observations = statistics.observations / sums.inputs_per_sample
    apart = statistics.covariance.diagonal() * sums.information.diagonal() / sums.samples
    effects = _effects_alone(sums, statistics)
    if len(apart) > TOO_WIDE * observations:
        return _independent(torch.where(apart > 0, effects, torch.zeros_like(effects)))
    # Γ and Σ are averages of their own; but a neuron of few samples matters for those.
    # Scaled by this, D is exact for each neuron that goes alone and leaves its mean.
    weights = torch.where(apart > 0, (effects / apart).sqrt(), torch.zeros_like(apart))
    information = weights[:, None] * (sums.information / sums.samples) * weights
    found = eliminate(shrunk(statistics.covariance, observations), information)
    growth = _on_new_samples(found.divergence, sums.read.distinct(name) / sums.inputs_per_sample)
    return replace(found, divergence=found.divergence * growth**2, growth=growth)


def _on_new_samples(divergence: Tensor, observations: float) -> Tensor:
    """What errors grow by where the neurons that stay were fitted to so many observations.

    They have at most half as many effective parameters, see
    :func:`nss_prune.compensation.ridge.ridge`.
    """
    left = torch.arange(len(divergence) - 1, -1, -1).to(divergence)
    parameters = (left + 1).clamp(max=observations / 2)
    return 1 / (1 - parameters / observations)


def _independent(costs: Tensor) -> Elimination:
    """Of neurons of which too little is known to fold one into others."""
    order = costs.argsort(stable=True)
    return Elimination(order, costs[order].cumsum(0) / 2)


def _effects_alone(sums: Sensitivity, statistics: ConsumerStatistics) -> Tensor:
    """2 D of each neuron that goes alone and leaves its mean, ``[neurons]``."""
    mean = statistics.mean
    first, mixed, second = sums.effects / sums.samples
    effects: Tensor = first - 2 * mean * mixed + mean**2 * second
    return effects.clamp(min=0)


def shrunk(covariance: Tensor, observations: float) -> Tensor:
    """A covariance that can be inverted, see :func:`shrinkage`."""
    share, variance = shrinkage(covariance, observations)
    smoothed = (1 - share) * covariance
    smoothed.diagonal().add_(variance)
    return smoothed


def shrinkage(covariance: Tensor, observations: float) -> tuple[float, float]:
    """Oracle approximating shrinkage: what is taken off a covariance, and added to its diagonal.

    Chen, Wiesel, Eldar, Hero (2010), IEEE Transactions on Signal Processing 58(10), eq. 23.

    Returns:
        Share of the covariance, in (0, 1], and variance.
    """
    size = len(covariance)
    trace, square = float(covariance.trace()), float(covariance.square().sum())
    numerator = (1 - 2 / size) * square + trace**2
    denominator = (observations + 1 - 2 / size) * (square - trace**2 / size)
    share = 1.0 if denominator <= 0 else min(1.0, max(LEAST_SHRINKAGE, numerator / denominator))
    return share, share * trace / size + torch.finfo(torch.float64).tiny


def eliminate(covariance: Tensor, information: Tensor) -> Elimination:
    """Backward elimination, see the module's text.

    Args:
        covariance: Σ, positive definite float64 ``[neurons, neurons]``.
        information: Γ of one sample, ``[neurons, neurons]``.
    """
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    root = _root(information).T.contiguous()
    alive = torch.arange(len(covariance), device=covariance.device)
    order, added = [], []
    while len(alive):
        ranks = (root.square().sum(1) / precision.diagonal()).argsort(stable=True)
        count = max(1, len(alive) // ROUNDS)
        out, stay = ranks[:count], ranks[count:].sort().values
        rows = precision.index_select(0, out)
        # Within a round one by one as well: the Cholesky factor eliminates in the order given.
        factor = torch.linalg.cholesky(rows[:, out])
        scaled = torch.linalg.solve_triangular(factor, root[out], upper=False)
        added.append(scaled.square().sum(1) / 2)
        order.append(alive[out])
        reach = torch.linalg.solve_triangular(factor, rows.index_select(1, stay), upper=False)
        root = root.index_select(0, stay).addmm_(reach.T, scaled, alpha=-1)
        precision = (
            precision.index_select(0, stay).index_select(1, stay).addmm_(reach.T, reach, alpha=-1)
        )
        alive = alive[stay]
    return Elimination(torch.cat(order), torch.cat(added).cumsum(0))


def _root(information: Tensor) -> Tensor:
    """W with WᵀW = Γ, to the rounding error with which Γ was summed."""
    unit = torch.eye(len(information)).to(information) * information.trace()
    for noise in (torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps):
        factor, failed = torch.linalg.cholesky_ex(information + noise * unit)
        if not failed:
            upper: Tensor = factor.T
            return upper
    variances, directions = torch.linalg.eigh(information)
    root: Tensor = variances.clamp(min=0).sqrt()[:, None] * directions.T
    return root
