"""What the arguments of NSSPruner may be, and what they ask for together."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nss_prune.core.processes import refuse_sharded
from nss_prune.errors import ArgumentError
from nss_prune.graph.tracing import refuse_reparametrised, resolve_layers
from nss_prune.profiling.selection import STRATEGIES, check_theta
from nss_prune.pruner.cost import CallLatency, Cost, MACs, Parameters

THETA = 0.95
"""The similarity threshold unless something else is asked for (paper, section 4.2)."""

BUDGETS: dict[str, type[Cost]] = {
    "params_budget": Parameters,
    "macs_budget": MACs,
    "latency_budget": CallLatency,
}

DEFAULT_RATIO: float = inspect.signature(tp.pruner.BasePruner).parameters["pruning_ratio"].default

DICT_ARGUMENTS = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")

NEEDS_RATIO = {  # of torch-pruning's arguments: what has no effect without a ratio, and what has
    "pruning_ratio_dict": "it overrides pruning_ratio for some layers; give pruning_ratio= as well",
    "head_pruning_ratio": "it goes with a ratio; give pruning_ratio= as well, 0 for heads alone",
    "head_pruning_ratio_dict": "it goes with a ratio; give pruning_ratio= as well",
    "isomorphic": "it says which layers share a ratio; give pruning_ratio= as well",
}

DEPRECATED = {"ch_sparsity": "pruning_ratio", "ch_sparsity_dict": "pruning_ratio_dict"}


@dataclass(frozen=True)
class Aim:
    """How much is to go over all steps; of theta, ratio and budget one is not None.

    Attributes:
        theta: The similarity threshold.
        ratio: Share of the neurons to remove, in [0, 1).
        budget: Share of the cost to keep, in (0, 1].
        cost: What the budget is a share of.
    """

    theta: float | None = None
    ratio: float | None = None
    budget: float | None = None
    cost: Cost | None = None


def find_aim(
    theta: float | None,
    ratio: float | None,
    kept: Sequence[float | None],
    budget: float | None,
    cost: Cost | None,
    importance: Any,
) -> Aim:
    """What the arguments ask for.

    Args:
        kept: The shares of :data:`BUDGETS`, in their order.

    Raises:
        ArgumentError: They ask for several things, or for one that is outside what it may be.
    """
    if ratio is not None and not 0 <= ratio < 1:
        raise ArgumentError(f"pruning_ratio is {ratio!r}; it is the share to remove, in [0, 1)")
    given = {n: share for n, share in zip(BUDGETS, kept, strict=True) if share is not None}
    if (budget is None) != (cost is None):
        raise ArgumentError(
            f"budget={budget!r} with cost={cost!r}; give both, the share to keep and an object "
            "that says of what, or params_budget=, macs_budget= or latency_budget="
        )
    costs = {name: BUDGETS[name]() for name in given}
    if budget is not None and cost is not None:
        given, costs = {**given, "budget": budget}, {**costs, "budget": cost}
    for name, share in given.items():
        if not 0 < share <= 1:
            raise ArgumentError(f"{name} is {share!r}; it is the share to keep, in (0, 1]")
    asked = {"pruning_ratio": ratio, **given} if ratio is not None else given
    if len(asked) > 1:
        named = ", ".join(f"{name}={share}" for name, share in asked.items())
        raise ArgumentError(f"{named}; give one of them, or none and theta")
    if theta is not None and (asked or importance is not None):
        named = ", ".join(f"{name}={share}" for name, share in asked.items()) or "importance="
        raise ArgumentError(f"theta={theta!r} has no effect with {named}; leave one of them out")
    for name, share in given.items():
        return Aim(budget=share, cost=costs[name])
    if ratio is None and importance is None:
        return Aim(theta=check_theta(THETA if theta is None else theta))
    return Aim(ratio=DEFAULT_RATIO if ratio is None else ratio)


def own_arguments(model: nn.Module, arguments: Mapping[str, Any], aim: Aim) -> dict[str, Any]:
    """Copies of what torch-pruning would change, in the forms that it understands.

    Raises:
        ArgumentError: torch-pruning has no such argument, it has no effect, or ignored_layers
            names a stranger.
    """
    known = set(inspect.signature(tp.pruner.BasePruner).parameters) - {"self"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ArgumentError(
            f"there is no argument {', '.join(unknown)}; NSSPruner takes its own and those of "
            f"torch_pruning.pruner.BasePruner: {', '.join(sorted(known))}"
        )
    _refuse_what_has_no_effect(arguments, aim)
    own = dict(arguments)
    for name in DICT_ARGUMENTS:
        own[name] = dict(own.get(name) or {})
    own["ignored_layers"] = resolve_layers(model, own.get("ignored_layers"))
    unwrapped = own.get("unwrapped_parameters") or ()
    pairs = unwrapped.items() if isinstance(unwrapped, Mapping) else unwrapped
    own["unwrapped_parameters"] = [tuple(pair) for pair in pairs]
    if aim.ratio is not None:
        own["pruning_ratio"] = aim.ratio
    return own


def is_uniform(arguments: Mapping[str, Any]) -> bool:
    """Whether torch-pruning's arguments leave a ratio the same for all layers and steps."""
    others = ("pruning_ratio_dict", "iterative_pruning_ratio_scheduler")
    return not any(arguments.get(name) for name in others)


def _refuse_what_has_no_effect(arguments: Mapping[str, Any], aim: Aim) -> None:
    for name, instead in DEPRECATED.items():
        if arguments.get(name) is not None:
            raise ArgumentError(f"{name} is torch-pruning's old name; give {instead}= instead")
    if aim.ratio is not None:
        return
    for name, remedy in NEEDS_RATIO.items():
        if arguments.get(name) not in (None, False, 0):
            raise ArgumentError(f"{name} has no effect here: {remedy}")
    if arguments.get("global_pruning") and aim.theta is not None:
        raise ArgumentError(
            "global_pruning has no effect with theta, which is one threshold for all layers; "
            "leave it out, or give pruning_ratio="
        )


def check_strategy(strategy: Any, aim: Aim, importance: Any, predicts: bool) -> None:
    """Raise where a strategy is none of those that there are, or does not suit what is asked for.

    Args:
        predicts: Whether there are a budget and data.
    """
    if not isinstance(strategy, str):
        missing = [name for name in ("observe", "select") if not hasattr(strategy, name)]
        if missing:
            raise ArgumentError(
                f"strategy is a {type(strategy).__name__} without {' and '.join(missing)}; give "
                "a name, or an object as nss_prune.pruner.strategy.Strategy says"
            )
        return
    known = (*STRATEGIES, "divergence")
    if strategy not in known:
        raise ArgumentError(f"strategy is {strategy!r}; use one of {known}, or an object")
    if strategy == "divergence" and (not predicts or importance is not None):
        raise ArgumentError(
            "strategy='divergence' allocates a budget from data: give macs_budget=, "
            "params_budget= or latency_budget=, and data=, and no importance="
        )
    if strategy in ("category", "global") and (aim.ratio is None or importance is not None):
        raise ArgumentError(
            f"strategy={strategy!r} takes a share of the ranking: give pruning_ratio=, and no "
            "importance="
        )


def check_repeatable(option: str, data: Iterable[Any] | None) -> None:
    """Raise where the data cannot be read several times, as an option needs it."""
    if data is None or isinstance(data, Iterator):
        raise ArgumentError(
            f"{option} with {'no data' if data is None else type(data).__name__}: the data is read "
            "several times; give data= as a list of batches or a DataLoader"
        )


def check_fold(fold: bool | str, data: Iterable[Any] | None) -> None:
    """Raise where it is none of those that there are, or "refit" without data for it."""
    if fold not in (True, False, "refit"):
        raise ArgumentError(f"fold is {fold!r}; use True, False or 'refit'")
    if fold == "refit":
        check_repeatable("fold='refit'", data)


def check_repairs(repairs: Iterable[Any]) -> tuple[Any, ...]:
    """The repairs as a tuple.

    Raises:
        ArgumentError: One lacks a method.
    """
    found = tuple(repairs)
    for repair in found:
        missing = [name for name in ("observe", "before", "after") if not hasattr(repair, name)]
        if missing:
            raise ArgumentError(
                f"repairs has a {type(repair).__name__} without {' and '.join(missing)}; give "
                "objects as nss_prune.pruner.repair.Repair says"
            )
    return found


def check_steps(steps: int, importance: Any, data: Any, profile: Any) -> None:
    """Raise where only the first of several steps has a profile, and the others need one."""
    if importance is None and data is None and profile is not None and steps > 1:
        raise ArgumentError(
            f"iterative_steps is {steps} with a profile of the first step only; give data= as "
            "well, to profile the further steps"
        )


def check_timeout(timeout: float) -> float:
    """The seconds themselves, which must be above 0."""
    if not timeout > 0:
        raise ArgumentError(f"timeout is {timeout!r}; give a number of seconds above 0")
    return timeout


def set_without_graph(
    pruner: Any, model: nn.Module, importance: Any, arguments: Mapping[str, Any]
) -> None:
    """Set what torch-pruning's constructor sets, where it could build no graph."""
    defaults = inspect.signature(tp.pruner.BasePruner).parameters
    for name in ("iterative_steps", "round_to", "max_pruning_ratio", "global_pruning"):
        setattr(pruner, name, arguments.get(name, defaults[name].default))
    pruner.model, pruner.importance, pruner.DG = model, importance, None
    pruner.num_heads, pruner.current_step = arguments["num_heads"], 0


def unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The model inside a wrapper for several devices, and the wrapper, or None.

    Raises:
        ArgumentError: Weights are masked, parametrized, or sharded over devices.
    """
    refuse_sharded(model)
    refuse_reparametrised(model)
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module, model
    return model, None
