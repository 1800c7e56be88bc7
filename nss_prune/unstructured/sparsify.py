"""Prune a share of the weights: budgets by a method, then one magnitude step."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from torch import Tensor, nn

from nss_prune.core.models import uncompiled
from nss_prune.errors import ArgumentError, NothingToPruneError
from nss_prune.unstructured.allocation import Allocation, allocate, find_method
from nss_prune.unstructured.masks import set_masks
from nss_prune.unstructured.weights import IgnoredLayers, Layer, check_finite, prunable_layers


def sparsify(
    model: nn.Module,
    amount: float,
    method: str | Allocation = "lamp",
    ignored_layers: IgnoredLayers = (),
) -> dict[str, Tensor]:
    """Mask a share of the remaining Linear and convolution weights of a model.

    The method says how many weights each layer keeps, and each keeps its largest, of equal
    ones the first by position. Exactly `round(remaining * (1 - amount))` weights are kept,
    weights that modules share counted once. Further calls refine the masks: a masked weight
    stays masked, through fine-tuning with any optimizer too. The masks are those of
    torch.nn.utils.prune; `make_permanent` or `prune.remove` turns them into zeros. To prune
    weights after neurons, call this after `NSSPruner.step`.

    While it runs it takes at most one and a half more copies of float32 weights, two of 16-bit
    ones; afterwards the masked weights and a byte a weight. Before `copy.deepcopy` of a model
    that was trained since, call `refresh`.

    Args:
        model: any module with float weights; changed in place.
        amount: share of the remaining weights to mask, in [0, 1).
        method: "lamp" (Lee et al. 2021), "global" (largest |w|), "uniform+" (Gale et al.
            2019), "erk" (Evci et al. 2020), or a function like those in `METHODS`.
        ignored_layers: modules or qualified names that stay as they are.

    Returns:
        For each pruned layer, by qualified name, what survives of all pruning so far: bool,
        shaped like the weight. Not a copy.

    Raises:
        ArgumentError: an argument is outside what it may be.
        NothingToPruneError: no weight is left, or the method exempts too many.
        NumericalError: a weight is NaN or infinite.
        In each case the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 2))
        >>> masks = sparsify(model, 0.1)
        >>> sum(int(mask.sum()) for mask in masks.values())
        108
    """
    check_share("amount", amount, least_is_allowed=True)
    find_method(method)
    model = uncompiled(model)
    layers = prunable_layers(model, ignored_layers)
    remaining = sum(layer.remaining for layer in layers)
    return keep_best(model, layers, round(remaining * (1 - amount)), method)


def keep_best(
    model: nn.Module, layers: Sequence[Layer], keep: int, method: str | Allocation
) -> dict[str, Tensor]:
    """Mask all but `keep` weights of the layers; returns the masks by name.

    Args:
        model: the model that the layers are of.
        layers: what `prunable_layers` returns, read since the last change.
        keep: how many weights to keep, from 0 to what remains.
        method: as in :func:`sparsify`.

    Raises:
        ArgumentError, NothingToPruneError, NumericalError: as :func:`sparsify`.
    """
    if not any(layer.remaining for layer in layers):
        raise NothingToPruneError(
            f"all weights of the {len(layers)} prunable layers are masked already: start "
            "again from an unpruned model, or ignore fewer layers"
        )
    masks = best_weights(layers, keep, method)
    set_masks(model, masks)
    return {layer.name: mask for layer, mask in masks.items()}


def best_weights(
    layers: Sequence[Layer], keep: int, method: str | Allocation
) -> dict[Layer, Tensor]:
    """Masks of the `keep` best weights of the layers; no model is changed.

    Args:
        layers: those to choose from; what their masks leave out is not chosen.
        keep: how many weights to keep, from 0 to what remains.
        method: as in :func:`sparsify`.

    Raises:
        ArgumentError, NothingToPruneError, NumericalError: as :func:`sparsify`.
    """
    check_finite(layers)
    budgets = allocate(method, layers, keep)
    return {
        layer: layer.magnitudes.largest(budget)
        for layer, budget in zip(layers, budgets, strict=True)
    }


def check_share(name: str, value: float, *, least_is_allowed: bool) -> None:
    """Refuse what is not a share below 1.

    Args:
        name: the argument, for the message.
        value: the share, in [0, 1) or (0, 1).
        least_is_allowed: whether 0 is.

    Raises:
        ArgumentError: says what is allowed.
    """
    above = isinstance(value, Real) and (value >= 0 if least_is_allowed else value > 0)
    if not above or not value < 1:
        allowed = "[0, 1)" if least_is_allowed else "(0, 1)"
        raise ArgumentError(
            f"{name} is {value!r}, but it is a share of the remaining weights: pass a number "
            f"in {allowed}, for example 0.1"
        )
