"""Neurons, then weights: the paper's model restructuring (section 4.1) in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nss_prune.core.undo import undone_on_error
from nss_prune.pruner.pruner import NSSPruner
from nss_prune.pruner.report import Report
from nss_prune.unstructured import sparsify
from nss_prune.unstructured.allocation import Allocation, find_method
from nss_prune.unstructured.sparsify import check_share


@dataclass(frozen=True)
class Restructured:
    """What became of a model.

    Attributes:
        report: On the neurons removed.
        masks: Layer -> True where a weight of the smaller model stays, shaped like the weight.
    """

    report: Report
    masks: dict[str, Tensor]


def restructure(
    model: nn.Module,
    example_inputs: Any,
    amount: float,
    method: str | Allocation = "lamp",
    **pruner_arguments: Any,
) -> Restructured:
    """Remove the neurons outside the semantic slice, then mask a share of the weights that stay.

    Both happen in place, or neither does. Masked weights stay zero through fine-tuning with any
    optimiser; ``nss_prune.unstructured.make_permanent`` makes them zeros for good.

    Args:
        example_inputs: Inputs of one call of the model.
        amount: Share of the weights of the smaller model to mask, in [0, 1).
        method: "lamp", "global", "uniform+", "erk" or a function, see :func:`sparsify`.
        **pruner_arguments: As :class:`NSSPruner` takes them; all its steps are taken.

    Raises:
        NSSPruneError: As :class:`NSSPruner` and :func:`sparsify`; the model is then as it was.
    """
    check_share("amount", amount, least_is_allowed=True)
    find_method(method)
    pruner = NSSPruner(model, example_inputs, **pruner_arguments)
    with undone_on_error(model):
        for _ in range(pruner.iterative_steps):
            pruner.step()
        masks = sparsify(model, amount, method)
    assert pruner.report is not None
    return Restructured(pruner.report, masks)
