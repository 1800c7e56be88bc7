"""The kernel of a layer and its similarity curves: nothing but tensors.

CKA between the embedding landscape of a subset of neurons and that of the whole layer is needed
for every prefix of a ranking. Landscapes add over neurons, so all prefixes come from the matrix
K[a, b] = <M_a, M_b> of the neurons' own landscapes (M_a is the Gram matrix of what neuron a
emits), without another look at the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nss_prune.errors import ArgumentError
from nss_prune.profiling.flat import DrawnSamples
from nss_prune.statistics.covariance import Covariance
from nss_prune.statistics.positions import positions

Features = Literal["pixel", "pooled", "flat"]
Ranking = Literal["magnitude", "signed"]

FEATURES = ("pixel", "pooled", "flat")
RANKINGS = ("magnitude", "signed")


@dataclass(frozen=True)
class Landscape:
    """How a landscape is made of activations.

    Attributes:
        features: "pixel", every (sample, position) is an observation; "pooled", a sample is one,
            averaged over its positions; "flat", a sample is one with all its positions as
            features, compared with all others of its category (paper, Eq. 1).
        centered: Centre the observations of a category (CKA as Kornblith et al., 2019); False is
            the paper's Eq. 2 to the letter.
        positions: "pixel" looks at this many positions of a map at most, spread evenly over all of
            its axes, because neighbours say nearly the same; None for all.
    """

    features: Features = "pixel"
    centered: bool = True
    positions: int | None = 64

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise ArgumentError(f"features is {self.features!r}; use one of {FEATURES}")
        if self.positions is not None and self.positions < 1:
            raise ArgumentError(f"positions is {self.positions}; give at least 1, or None for all")

    def observations(self, activation: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """What is observed of ``[samples, neurons, positions]``: ``[neurons, samples, seen]``.

        Args:
            shape: Of the map whose positions these are; one axis where it is not known.
        """
        by_neuron = activation.transpose(0, 1)
        if self.features == "pooled":
            return by_neuron.mean(2, keepdim=True)
        if self.features == "flat":
            return by_neuron.contiguous()
        chosen = positions(shape or by_neuron.shape[2:], self.positions)
        return by_neuron[:, :, chosen.to(activation.device)]


class LandscapeSums:
    """What one category of one group adds up to.

    Of "flat" features with several positions the activations are kept, because the landscapes of
    all pairs of samples are wanted; where a sample is one number, they are in its second moments.

    Attributes:
        covariance: Of the observations, ``[neurons, neurons]``.
        drawn: The activations, where they are kept.
    """

    def __init__(self, covariance: Covariance, drawn: DrawnSamples | None = None) -> None:
        self.covariance = covariance
        self.drawn = drawn

    @classmethod
    def zeros(cls, neurons: int, device: torch.device | str = "cpu") -> LandscapeSums:
        """No observations yet."""
        return cls(Covariance(neurons, device=device))

    def clear(self) -> None:
        """Forget everything added."""
        self.covariance.clear()
        self.drawn = None

    def add(self, landscape: Landscape, observed: Sequence[Tensor]) -> None:
        """Add what all consumers of a batch observed, each ``[neurons, samples, seen]``.

        Raises:
            DataError: With "flat", samples have other positions than those before.
        """
        if landscape.features == "flat" and self._has_positions(observed):
            self.drawn = self.drawn or DrawnSamples()
            self.drawn.add(observed)
            return
        for values in observed:
            self.covariance.add(values.flatten(1))

    def _has_positions(self, observed: Sequence[Tensor]) -> bool:
        return self.drawn is not None or sum(values.shape[2] for values in observed) > 1

    def __add__(self, other: LandscapeSums) -> LandscapeSums:
        drawn = self.drawn or other.drawn
        if self.drawn and other.drawn:
            drawn = self.drawn + other.drawn
        return LandscapeSums(self.covariance + other.covariance, drawn)

    def kernel(self, landscape: Landscape) -> Tensor:
        """K, ``[neurons, neurons]``, not negative."""
        if self.drawn is not None:
            return self.drawn.kernel(landscape.centered)
        if landscape.centered:
            return self.covariance.scatter.square()
        return self.covariance.second_moments.square_()


def ranked(contributions: Tensor, ranking: Ranking = "magnitude") -> Tensor:
    """Neurons from the largest contribution to the smallest, along the last axis; ties by position.

    Args:
        ranking: "magnitude": a neuron that speaks against a category (DeepLIFT), or whose average
            is below zero, changes as much when it is removed as one that speaks for it. "signed":
            the paper's descending order (Algorithm 1), negative contributions last.
    """
    return sizes(contributions, ranking).argsort(dim=-1, descending=True, stable=True)


def sizes(contributions: Tensor, ranking: Ranking) -> Tensor:
    """What contributions are ranked by, in the same shape."""
    return contributions.abs() if ranking == "magnitude" else contributions


def check_ranking(ranking: Ranking) -> Ranking:
    """``ranking`` itself.

    Raises:
        ArgumentError: It is not one of the choices.
    """
    if ranking not in RANKINGS:
        raise ArgumentError(f"ranking is {ranking!r}; use one of {RANKINGS}")
    return ranking


def similarity_curve(kernel: Tensor, order: Tensor) -> Tensor:
    """CKA (paper, Eq. 2) of every prefix of a ranking with the whole layer.

    Args:
        kernel: K, ``[neurons, neurons]``.
        order: Neurons from the highest to the lowest contribution, ``[neurons]``.

    Returns:
        ``[neurons]``: entry k - 1 is the similarity of the first k neurons, in [0, 1]. A layer
        that emits nothing is represented by anything: its similarities are 1.
    """
    ranks = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    with_earlier = (kernel * (ranks[:, None] > ranks)).sum(1)
    numerator = kernel.sum(1)[order].cumsum(0)
    prefix = (2 * with_earlier + kernel.diagonal())[order].cumsum(0)
    total = prefix[-1]
    if total <= 0:
        return torch.ones_like(numerator)
    denominator = prefix.sqrt() * total.sqrt()
    curve = torch.where(denominator > 0, numerator / denominator, torch.zeros_like(numerator))
    return curve.clamp(0, 1)


def entry_thresholds(curve: Tensor, order: Tensor, interval: int = 1) -> Tensor:
    """The threshold above which Algorithm 1 takes a neuron in.

    Algorithm 1 adds ``interval`` neurons at a time until the similarity reaches θ. The curve is
    not monotone, so the neuron of rank r is taken iff the largest similarity seen before it, at
    the multiples of ``interval``, is below θ: that maximum is its entry threshold.

    Args:
        curve: Similarity after each rank, ``[..., neurons]``.
        order: Neurons by rank, ``[..., neurons]``.
        interval: Neurons added at a time, at least 1.

    Returns:
        ``[..., neurons]``, by neuron (not by rank), in [0, 1].

    Raises:
        ArgumentError: ``interval`` is below 1.
    """
    check_interval(interval)
    ranks = torch.arange(curve.shape[-1], device=curve.device)
    checked = torch.where((ranks + 1) % interval == 0, curve, torch.zeros_like(curve))
    highest = checked.cummax(-1).values
    before = torch.cat([torch.zeros_like(highest[..., :1]), highest[..., :-1]], dim=-1)
    return torch.empty_like(before).scatter(-1, order, before)


def check_interval(interval: int) -> int:
    """``interval`` itself.

    Raises:
        ArgumentError: It is below 1.
    """
    if interval < 1:
        raise ArgumentError(f"interval is {interval}; give a whole number of at least 1")
    return interval
