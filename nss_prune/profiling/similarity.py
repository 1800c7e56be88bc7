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
from nss_prune.statistics.positions import positions

Features = Literal["pixel", "pooled", "flat"]

FEATURES = ("pixel", "pooled", "flat")


@dataclass(frozen=True)
class Landscape:
    """How a landscape is made of activations.

    Attributes:
        features: "pixel", every (sample, position) is an observation; "pooled", a sample is one,
            averaged over its positions; "flat", a sample is one with all its positions as
            features, compared within each batch (paper, Eq. 1).
        centered: Centre the observations (CKA as Kornblith et al., 2019); False is the paper's
            Eq. 2 to the letter. With "flat" each batch is centred by itself.
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
    """What one category of one group adds up to, in float64.

    Observations wait until there are as many as neurons: adding a matrix of neurons squared for
    every few of them would cost more than they do.

    Args:
        matrix: Σ x_a x_b over the observations; with "flat" Σ <M_a, M_b> over the batches,
            ``[neurons, neurons]``.
        total: Σ x_a over the observations, ``[neurons]``.
        rows: Number of observations.
    """

    def __init__(self, matrix: Tensor, total: Tensor, rows: int = 0) -> None:
        self._matrix = matrix
        self._total = total
        self.rows = rows
        self._waiting: list[Tensor] = []
        self._waiting_rows = 0

    @classmethod
    def zeros(cls, neurons: int, device: torch.device | str = "cpu") -> LandscapeSums:
        """No observations yet."""
        matrix = torch.zeros(neurons, neurons, dtype=torch.float64, device=device)
        return cls(matrix, torch.zeros(neurons, dtype=torch.float64, device=device))

    def clear(self) -> None:
        """Forget everything added."""
        self.rows = 0
        self._waiting.clear()
        self._waiting_rows = 0
        self._matrix.zero_()
        self._total.zero_()

    @property
    def matrix(self) -> Tensor:
        """Σ x_a x_b of everything added, ``[neurons, neurons]``."""
        self._work_off()
        return self._matrix

    @property
    def total(self) -> Tensor:
        """Σ x_a of everything added, ``[neurons]``."""
        self._work_off()
        return self._total

    def add(self, landscape: Landscape, observed: Sequence[Tensor]) -> None:
        """Add what all readers of a batch observed, each ``[neurons, samples, seen]``."""
        if landscape.features == "flat":
            self._add_flat(landscape, observed)
            return
        for values in observed:
            rows = values.flatten(1)
            self._waiting.append(rows)
            self._waiting_rows += rows.shape[1]
            self.rows += rows.shape[1]
        if self._waiting_rows >= len(self._total):
            self._work_off()

    def _work_off(self) -> None:
        if not self._waiting:
            return
        rows = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, dim=1)
        self._waiting.clear()
        self._waiting_rows = 0
        self._matrix += rows @ rows.T
        self._total += rows.sum(1, dtype=torch.float64)

    def _add_flat(self, landscape: Landscape, observed: Sequence[Tensor]) -> None:
        grams: Tensor | None = None
        for values in observed:
            if landscape.centered:
                values = values - values.mean(1, keepdim=True)
            gram = values @ values.transpose(1, 2)
            grams = gram if grams is None else grams + gram
        if grams is not None:
            landscapes = grams.flatten(1)
            self._matrix += landscapes @ landscapes.T
            self.rows += observed[0].shape[1]

    def __add__(self, other: LandscapeSums) -> LandscapeSums:
        return LandscapeSums(
            self.matrix + other.matrix, self.total + other.total, self.rows + other.rows
        )

    def kernel(self, landscape: Landscape) -> Tensor:
        """K, ``[neurons, neurons]``, not negative."""
        if landscape.features == "flat":
            return self.matrix
        if not landscape.centered or self.rows == 0:
            return self.matrix.square()
        return (self.matrix - torch.outer(self.total, self.total) / self.rows).square_()


def ranked(contributions: Tensor) -> Tensor:
    """Neurons from the largest contribution to the smallest; ties by position.

    By magnitude: a neuron that speaks against a category (DeepLIFT), or whose average is below
    zero, changes as much when it is removed as one that speaks for it.
    """
    return contributions.abs().argsort(dim=-1, descending=True, stable=True)


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
