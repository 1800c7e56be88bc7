"""How many weights each layer keeps: one small function a method.

A method gets the layers and the number of weights to keep in all, and returns how many
each layer keeps; which ones is not its business. Write another by the same rule and pass
it as `method`, or name it in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from nss_prune.errors import ArgumentError, NothingToPruneError
from nss_prune.unstructured.magnitudes import Floats
from nss_prune.unstructured.ranking import best
from nss_prune.unstructured.weights import Layer

Allocation = Callable[[Sequence[Layer], int], Sequence[int]]
"""(layers, keep) -> weights to keep `[layers]`, each at most `layer.remaining`, summing to
`keep`, which is at most what remains in all."""


def lamp(layers: Sequence[Layer], keep: int) -> list[int]:
    """Keep the best by LAMP score over all layers.

    The score of a weight is w² / Σ w² over the weights of its layer that are not smaller
    (equal ones rank by position), so that the largest of each layer scores 1; zeros score 0.
    J. Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021,
    arXiv 2010.07611, equation 1. Sums run from the large end, in float64.
    """
    return best(layers, keep, _lamp_score)


def global_magnitude(layers: Sequence[Layer], keep: int) -> list[int]:
    """Keep the largest |w| over all layers."""
    return best(layers, keep, lambda magnitude, energy: magnitude)


def uniform_plus(layers: Sequence[Layer], keep: int) -> list[int]:
    """Every layer loses the same share of what remains of it, with two exceptions.

    The first layer of the model stays as it is if it is a convolution, and the last keeps
    at least 20 % of its weights. T. Gale et al., "The state of sparsity in deep neural
    networks", 2019, arXiv 1902.09574.

    Raises:
        NothingToPruneError: the exceptions alone need more than `keep` weights.
    """
    remaining = [layer.remaining for layer in layers]
    fixed = {
        index: layer.remaining
        for index, layer in enumerate(layers)
        if layer.is_first and layer.is_convolution
    }
    budgets = proportional(remaining, layers, keep, fixed)
    for index, layer in enumerate(layers):
        least = min(layer.remaining, -(-layer.size // 5))
        if layer.is_last and budgets[index] < least:
            return proportional(remaining, layers, keep, {**fixed, index: least})
    return budgets


def erk(layers: Sequence[Layer], keep: int) -> list[int]:
    """Each layer keeps weights in proportion to the sum of its dimensions.

    That is outputs + inputs + kernel sizes (Erdős-Rényi-kernel): large layers end sparser.
    U. Evci et al., "Rigging the lottery", ICML 2020, arXiv 1911.11134. Layers that would
    keep more than they have stay as they are, the furthest beyond first.
    """
    return proportional([sum(layer.shape) for layer in layers], layers, keep)


METHODS: dict[str, Allocation] = {
    "lamp": lamp,
    "global": global_magnitude,
    "uniform+": uniform_plus,
    "erk": erk,
}
"""The methods by name; add to it to name your own."""


def proportional(
    shares: Sequence[int], layers: Sequence[Layer], keep: int, fixed: dict[int, int] | None = None
) -> list[int]:
    """Budgets in proportion to `shares`, none above what the layer has left.

    The layer that would exceed what it has left by the largest factor keeps all of it, and
    the rest is shared out again, until none would. What rounding leaves over goes to the
    largest remainders, of equal ones to the first layer. All in whole numbers.

    Args:
        shares: `[layers]`, positive for every layer with weights left.
        layers: the layers.
        keep: the sum of the budgets.
        fixed: budgets that are given, by the index of the layer.

    Raises:
        NothingToPruneError: the fixed budgets alone exceed `keep`.
    """
    budgets = {i: 0 for i, layer in enumerate(layers) if not layer.remaining} | (fixed or {})
    if sum(budgets.values()) > keep:
        raise NothingToPruneError(
            f"{keep} weights are to be kept, but {sum(budgets.values())} are exempt from this "
            "method: prune less or choose another method"
        )
    free = [index for index in range(len(layers)) if index not in budgets]
    free.sort(key=lambda index: Fraction(-shares[index], layers[index].remaining))
    while free and _exceeds(free, shares, layers, keep - sum(budgets.values())):
        dense = free.pop(0)
        budgets[dense] = layers[dense].remaining
    budgets |= _apportion({i: shares[i] for i in sorted(free)}, keep - sum(budgets.values()))
    return [budgets[index] for index in range(len(layers))]


def allocate(method: str | Allocation, layers: Sequence[Layer], keep: int) -> list[int]:
    """The budgets of a method, checked.

    Args:
        method: a name in `METHODS` or a function like those in it.
        layers: the layers.
        keep: how many weights to keep in all, from 0 to what remains.

    Returns:
        `[layers]`, summing to `keep`.

    Raises:
        ArgumentError: the method is not known, or its budgets break the rule.
        NothingToPruneError: the method cannot go down to `keep`.
    """
    budgets = [int(budget) for budget in find_method(method)(layers, keep)]
    fits = len(budgets) == len(layers) and all(
        0 <= budget <= layer.remaining for budget, layer in zip(budgets, layers, strict=True)
    )
    if not fits or sum(budgets) != keep:
        raise ArgumentError(
            f"method {method!r} returned budgets {budgets}: they must be one for each of "
            f"{len(layers)} layers, from 0 to what remains of it, and sum to {keep}"
        )
    return budgets


def find_method(method: str | Allocation) -> Allocation:
    """The function of a method.

    Raises:
        ArgumentError: the name is not in `METHODS`.
    """
    if callable(method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ArgumentError(
            f"method is {method!r}: pass one of {sorted(METHODS)} or a function of (layers, keep)"
        )
    return METHODS[method]


def _lamp_score(magnitude: Floats, energy: Floats) -> Floats:
    square = np.square(magnitude)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(square > 0, square / energy, 0.0)


def _exceeds(free: list[int], shares: Sequence[int], layers: Sequence[Layer], left: int) -> bool:
    """Whether the first of the free layers would keep more than it has."""
    whole = sum(shares[index] for index in free)
    return left * shares[free[0]] > layers[free[0]].remaining * whole


def _apportion(shares: dict[int, int], total: int) -> dict[int, int]:
    """Whole numbers in proportion to the shares that sum to the total."""
    whole = sum(shares.values())
    parts = {index: divmod(total * share, whole) for index, share in shares.items()}
    over = total - sum(quotient for quotient, _ in parts.values()) if parts else 0
    lucky = sorted(parts, key=lambda index: -parts[index][1])[:over]
    return {index: quotient + (index in lucky) for index, (quotient, _) in parts.items()}
