"""What the channels that stay explain of those that go, for all levels from one factorisation.

A level removes the first n channels P of an order and keeps the others S. They explain
B (x_S − μ_S) with B = Σ_PS Σ_SS⁻¹, which by gradients g adds e = gᵀ B (x_S − μ_S) to the loss.
No B is ever formed: with the channels in the order in which they go,

- Σ = V Vᵀ with V upper triangular gives B = V_PS V_SS⁻¹. V_SS is a trailing block of V at every
  level, so that V⁻¹ x of all levels is solved for once.
- Where a consumer reads several groups, Ω = Σ⁻¹ serves all of them. The Cholesky factor of its
  leading block gives rows U with Ω = UᵀU, and B = −U_PP⁻¹ U_PS. U_PP is a leading block at every
  level, so that U⁻ᵀ g is solved for once.
- Where there were far fewer observations than channels, Σ = F Fᵀ + c I has few columns F, and
  B = F_P (F_Sᵀ F_S + c I)⁻¹ F_Sᵀ.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nss_prune.allocation.elimination import shrinkage, shrunk

NARROW = 8  # channels for each observation, from which a factor of few columns is faster


class Explained(Protocol):
    """Adds what the channels that stay explain to e."""

    @property
    def values(self) -> int:
        """Values that are kept."""
        ...

    def effects(self, values: Tensor, slope: Tensor, gone: Sequence[int]) -> Tensor:
        """gᵀ B (x_S − μ_S) of each level, ``[levels, rows]``.

        Args:
            values: x − μ in the order in which the channels go, ``[channels, rows]``.
            slope: g of those that go at the last level, ``[gone, rows]``.
            gone: Channels that have gone at each level.
        """
        ...


@dataclass(frozen=True)
class ByFactor:
    """From V, or from the first rows of U.

    Attributes:
        factor: Float32 ``[gone, channels]``; V ``[channels, channels]``.
        is_inverse: Whether it is U.
    """

    factor: Tensor
    is_inverse: bool

    @property
    def values(self) -> int:
        """See :class:`Explained`."""
        return self.factor.numel()

    def effects(self, values: Tensor, slope: Tensor, gone: Sequence[int]) -> Tensor:
        """See :class:`Explained`."""
        factor = self.factor.to(values)
        if self.is_inverse:
            leading = factor[:, : len(factor)].T
            slope = torch.linalg.solve_triangular(leading, -slope, upper=False)
        else:
            values = torch.linalg.solve_triangular(factor, values, upper=True)
        reach = torch.zeros_like(values)  # of the channels that went so far, in those that stay
        found = []
        for first, last in itertools.pairwise((0, *gone)):
            reach[last:].addmm_(factor[first:last, last:].T, slope[first:last])
            found.append((reach[last:] * values[last:]).sum(0))
        return torch.stack(found)


@dataclass(frozen=True)
class ByObservations:
    """From F.

    Attributes:
        columns: F, float32 ``[channels, columns]``.
        inverses: (F_Sᵀ F_S + c I)⁻¹ of each level, float64 ``[levels, columns, columns]``.
    """

    columns: Tensor
    inverses: Tensor

    @property
    def values(self) -> int:
        """See :class:`Explained`."""
        return self.columns.numel() + 2 * self.inverses.numel()

    def effects(self, values: Tensor, slope: Tensor, gone: Sequence[int]) -> Tensor:
        """See :class:`Explained`."""
        columns = self.columns.to(values)
        blocks = list(itertools.pairwise((0, *gone, len(columns))))
        known = torch.stack([columns[first:last].T @ values[first:last] for first, last in blocks])
        known = known.flip(0).cumsum(0).flip(0)[1:].double()
        lost = torch.stack([columns[a:b].T @ slope[a:b] for a, b in blocks[:-1]]).cumsum(0)
        return (lost * (self.inverses @ known)).sum(1).to(values)


def by_covariance(
    covariance: Tensor, observations: float, rows: int, order: Tensor, gone: Sequence[int]
) -> Explained:
    """Of a consumer of one group.

    Args:
        covariance: Not shrunk yet, float64 ``[channels, channels]``.
        observations: As :func:`.shrunk` takes them.
        rows: That the covariance is of.
        order: Of the channels, first those that go.
        gone: Channels that have gone at each level.
    """
    if rows * NARROW <= len(covariance):
        return _by_observations(covariance, observations, rows, order, gone)
    backward = order.flip(0)
    factor = torch.linalg.cholesky(shrunk(covariance, observations)[backward][:, backward])
    return ByFactor(factor.flip(0, 1).float(), is_inverse=False)


def by_precision(precision: Tensor, order: Tensor, gone: Sequence[int]) -> Explained:
    """Of one of several groups of a consumer.

    Args:
        precision: Ω, positive definite float64 ``[channels, channels]``.
        order: Of the channels, first those that go.
        gone: Channels that have gone at each level.
    """
    most = max(gone)
    leading = precision[order[:most]][:, order]
    factor = torch.linalg.cholesky(leading[:, :most])
    rest = torch.linalg.solve_triangular(factor, leading[:, most:], upper=False)
    return ByFactor(torch.cat([factor.T, rest], 1).float(), is_inverse=True)


def _by_observations(
    covariance: Tensor, observations: float, rows: int, order: Tensor, gone: Sequence[int]
) -> ByObservations:
    """A covariance of so few rows has no more columns (Halko, Martinsson, Tropp, 2011)."""
    share, variance = shrinkage(covariance, observations)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(covariance), rows, generator=generator, dtype=covariance.dtype)
    basis = torch.linalg.qr(covariance @ drawn.to(covariance)).Q
    variances, directions = torch.linalg.eigh(basis.T @ covariance @ basis)
    deviations = ((1 - share) * variances.clamp(min=0)).sqrt()
    columns = (basis @ (directions * deviations))[order]
    blocks = [part.T @ part for part in columns.tensor_split(list(gone))]
    known = torch.stack(blocks).flip(0).cumsum(0).flip(0)[1:]
    known.diagonal(dim1=1, dim2=2).add_(variance)
    return ByObservations(columns.float(), torch.cholesky_inverse(torch.linalg.cholesky(known)))
