"""Which positions of a map are looked at.

Neighbouring positions say nearly the same, so sums over all positions of a map are estimated from
some of them. Every axis is covered evenly, whatever its length: the positions are those of an
additive recurrence whose steps are powers of the generalised golden ratio (Roberts, 2018), one for
each axis, which repeats itself on no axis. A random shift makes each position equally likely
(Cranley, Patterson, 1976), so that over many seeds the sums are those over all positions.

Gradients are not spread like that: through a class token or a maximum they reach few positions.
These are sampled by their size, with weights that make up for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nss_prune.core.draws import Draws

POSITIONS = 64
"""Positions of a map that are looked at."""


def positions(shape: Sequence[int], wanted: int | None = POSITIONS, seed: int = 0) -> Tensor:
    """Positions of a flattened map, int64 ``[positions]``: all, or ``wanted`` where it has more.

    Args:
        shape: Of the map, any number of axes.
        wanted: None for all.
        seed: Of the shift; the same positions for the same seed and shape.
    """
    available = math.prod(shape)
    if wanted is None or available <= wanted:
        return torch.arange(available)
    axes = torch.tensor([size for size in shape if size > 1], dtype=torch.float64)
    ratio = _golden_ratio(len(axes))
    steps = ratio ** -torch.arange(1, len(axes) + 1, dtype=torch.float64)
    shift = torch.rand(len(axes), generator=torch.Generator().manual_seed(seed)).double()
    points = (shift + torch.arange(wanted, dtype=torch.float64)[:, None] * steps) % 1
    places = (points * axes).long()
    strides = [math.prod(axes[axis + 1 :].long().tolist()) for axis in range(len(axes))]
    return (places * torch.tensor(strides)).sum(1)


def _golden_ratio(axes: int) -> float:
    """The positive root of x^(axes + 1) = x + 1."""
    root = 2.0
    for _ in range(64):
        root = (1 + root) ** (1 / (axes + 1))
    return root


def spaced(values: Tensor, axis: int, shape: Sequence[int] | None = None) -> Tensor:
    """The entries of ``values`` at some :func:`positions` along an axis.

    Args:
        shape: Of the map that is flattened along the axis; one axis where it is not known.
    """
    chosen = positions(shape or (values.shape[axis],))
    if len(chosen) == values.shape[axis]:
        return values
    return values.index_select(axis, chosen.to(values.device))


def by_size(gradient: Tensor, draws: Draws, wanted: int = POSITIONS) -> Tensor:
    """Rows whose second moment estimates that of all positions of a gradient.

    Positions are drawn with probabilities in proportion to the squared norm of what they carry,
    by systematic sampling (Madow, 1949), and divided by the root of how often they are expected:
    E[Σ rows rowsᵀ] = Σ_positions g gᵀ for each sample. Where no more than ``wanted`` positions of
    the batch carry anything, they are taken as they are.

    Args:
        gradient: ``[samples, neurons, positions]``.
        draws: Of the samples.

    Returns:
        ``[samples, neurons, rows]``.
    """
    if gradient.shape[2] <= wanted:
        return gradient
    sizes = gradient.square().sum(1, dtype=torch.float64)
    carrying = (sizes > 0).any(0).nonzero().flatten()
    if len(carrying) <= wanted:
        return gradient.index_select(2, carrying)
    totals = sizes.sum(1, keepdim=True)
    expected = wanted * sizes / totals.clamp(min=torch.finfo(torch.float64).tiny)
    marks = draws.uniform()[:, None].to(sizes) + torch.arange(wanted).to(sizes)
    drawn = torch.searchsorted(expected.cumsum(1), marks, right=True)
    drawn = drawn.clamp(max=gradient.shape[2] - 1)
    weights = expected.gather(1, drawn).clamp(min=torch.finfo(torch.float32).tiny).rsqrt()
    rows = gradient.gather(2, drawn[:, None].expand(-1, gradient.shape[1], -1))
    return rows * weights[:, None].to(rows)
