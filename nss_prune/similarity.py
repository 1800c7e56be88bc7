"""The kernel of a layer and its similarity curves: nothing but tensors.

CKA between the embedding landscape of a subset of neurons and that of the whole layer is needed
for every prefix of a ranking. Landscapes add over neurons, so all prefixes come from the matrix
K[a, b] = <M_a, M_b> of the neurons' own landscapes (M_a is the Gram matrix of what neuron a
emits), without another look at the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nss_prune.errors import ArgumentError


def pixel_kernel(second: Tensor, total: Tensor, rows: int, centered: bool = True) -> Tensor:
    """K when every (sample, position) is a row.

    Args:
        second: Σ x_a x_b over the rows, ``[neurons, neurons]``, float64.
        total: Σ x_a over the rows, ``[neurons]``, float64.
        rows: Number of rows.
        centered: Subtract each neuron's mean first.

    Returns:
        ``[neurons, neurons]``, not negative.
    """
    if centered:
        second = second - torch.outer(total, total) / rows
    return second.square()


def similarity_curve(kernel: Tensor, order: Tensor) -> Tensor:
    """CKA (paper, Eq. 2) of every prefix of a ranking with the whole layer.

    Args:
        kernel: K, ``[neurons, neurons]``.
        order: Neurons from the highest to the lowest contribution, ``[neurons]``.

    Returns:
        ``[neurons]``: entry k - 1 is the similarity of the first k neurons, in [0, 1]. A layer
        that emits nothing is represented by anything: its similarities are 1.
    """
    ranked = kernel[order][:, order]
    numerator = ranked.sum(1).cumsum(0)
    added = 2 * ranked.tril(-1).sum(1) + ranked.diagonal()
    prefix = added.cumsum(0).clamp_min(0)
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
    if interval < 1:
        raise ArgumentError(f"interval is {interval}; give a whole number of at least 1")
    ranks = torch.arange(curve.shape[-1], device=curve.device)
    checked = torch.where((ranks + 1) % interval == 0, curve, torch.zeros_like(curve))
    highest = checked.cummax(-1).values
    before = torch.cat([torch.zeros_like(highest[..., :1]), highest[..., :-1]], dim=-1)
    return torch.empty_like(before).scatter(-1, order, before)
