"""What the arguments of NSSPruner may be."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch_pruning as tp
from torch import nn

from nss_prune.core.processes import processes
from nss_prune.errors import ArgumentError
from nss_prune.graph.tracing import resolve_layers
from nss_prune.profiling.selection import STRATEGIES

BUDGETS = {"params_budget": "parameters", "macs_budget": "MACs", "latency_budget": "latency"}

DICT_ARGUMENTS = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")


def own_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of what torch-pruning would change, in the forms that it understands.

    Raises:
        ArgumentError: torch-pruning has no such argument, or ignored_layers names a stranger.
    """
    known = set(inspect.signature(tp.pruner.BasePruner).parameters) - {"self"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ArgumentError(
            f"there is no argument {', '.join(unknown)}; NSSPruner takes its own and those of "
            f"torch_pruning.pruner.BasePruner: {', '.join(sorted(known))}"
        )
    own = dict(arguments)
    for name in DICT_ARGUMENTS:
        own[name] = dict(own.get(name) or {})
    own["ignored_layers"] = resolve_layers(model, own.get("ignored_layers"))
    unwrapped = own.get("unwrapped_parameters") or ()
    pairs = unwrapped.items() if isinstance(unwrapped, Mapping) else unwrapped
    own["unwrapped_parameters"] = [tuple(pair) for pair in pairs]
    return own


def check_ratio(ratio: float | None) -> float | None:
    if ratio is not None and not 0 <= ratio < 1:
        raise ArgumentError(f"pruning_ratio is {ratio!r}; it is the share to remove, in [0, 1)")
    return ratio


def check_budgets(
    given: Mapping[str, float | None], ratio: float | None, importance: Any
) -> dict[str, float]:
    """What is a share of what, of the arguments by their names."""
    budgets = {BUDGETS[name]: share for name, share in given.items() if share is not None}
    for kind, share in budgets.items():
        if not 0 < share <= 1:
            raise ArgumentError(
                f"the budget is {share!r} of the {kind}; it is the share to keep, in (0, 1]"
            )
    if len(budgets) + (ratio is not None) > 1:
        named = ", ".join(f"{name}={share}" for name, share in given.items())
        raise ArgumentError(f"pruning_ratio={ratio}, {named}; give one of them, or none and theta")
    if "latency" in budgets and processes() > 1:
        raise ArgumentError(
            "every process would time the model otherwise and keep other neurons; prune with "
            "latency_budget in one process, or give macs_budget or params_budget"
        )
    if budgets and importance is not None:
        raise ArgumentError(
            "a budget is solved over the entry thresholds of semantic slicing; give pruning_ratio "
            "with importance="
        )
    return budgets


def check_strategy(strategy: str, ratio: float | None, importance: Any, foresees: bool) -> None:
    """Args: ``foresees``, whether there are a budget and data."""
    known = (*STRATEGIES, "divergence")
    if strategy not in known:
        raise ArgumentError(f"strategy is {strategy!r}; use one of {known}")
    if strategy == "divergence" and not foresees:
        raise ArgumentError(
            "strategy='divergence' allocates a budget from data: give macs_budget=, "
            "params_budget= or latency_budget=, and data="
        )
    if strategy in ("category", "global") and (ratio is None or importance is not None):
        raise ArgumentError(
            f"strategy={strategy!r} takes a share of the ranking: give pruning_ratio=, and no "
            "importance="
        )


def check_repeatable(option: str, data: Iterable[Any] | None) -> None:
    """Raise where the data cannot be read several times, by one process, as an option needs it."""
    if data is None or isinstance(data, Iterator):
        raise ArgumentError(
            f"{option} with {'no data' if data is None else type(data).__name__}: the data is read "
            "several times; give data= as a list of batches or a DataLoader"
        )
    if processes() > 1:
        raise ArgumentError(
            f"{option} with {processes()} processes, each of which would find values of its own; "
            "prune in one process"
        )


def check_fold(fold: bool | str, data: Iterable[Any] | None) -> None:
    """Raise where it is none of those that there are, or "refit" without data for it."""
    if fold not in (True, False, "refit"):
        raise ArgumentError(f"fold is {fold!r}; use True, False or 'refit'")
    if fold == "refit":
        check_repeatable("fold='refit'", data)
