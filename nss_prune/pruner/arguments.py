"""What the arguments of NSSPruner may be, and what they ask for together."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nss_prune.core.models import Forward, evaluation, uncompiled
from nss_prune.core.processes import refuse_sharded
from nss_prune.errors import ArgumentError
from nss_prune.graph.axes import side_width
from nss_prune.graph.tracing import refuse_reparametrised, resolve_layers
from nss_prune.profiling.selection import STRATEGIES, check_theta
from nss_prune.pruner.cost import CallLatency, Cost, CostSpec, MACs, Parameters, cost_named
from nss_prune.pruner.limits import AUTO, check_round_to
from nss_prune.pruner.quality import Quality, find_quality
from nss_prune.pruner.strategy import Score

THETA = 0.95
"""The similarity threshold unless something else is asked for (paper, section 4.2)."""

BUDGETS: dict[str, type[Cost]] = {
    "params_budget": Parameters,
    "macs_budget": MACs,
    "latency_budget": CallLatency,
}

PARAMETERS = inspect.signature(tp.pruner.BasePruner).parameters
"""Of torch-pruning's pruner, looked at before a script puts NSSPruner in its place."""

DEFAULT_RATIO: float = PARAMETERS["pruning_ratio"].default

AFTER_IMPORTANCE = tuple(PARAMETERS)[3:]

DICT_ARGUMENTS = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")

NEEDS_RATIO = {  # of torch-pruning's arguments: what has no effect without a ratio, and what has
    "pruning_ratio_dict": "it overrides pruning_ratio for some layers; give pruning_ratio= as well",
    "head_pruning_ratio": "it goes with a ratio; give pruning_ratio= as well, 0 for heads alone",
    "head_pruning_ratio_dict": "it goes with a ratio; give pruning_ratio= as well",
    "isomorphic": "it says which layers share a ratio; give pruning_ratio= as well",
}

PROFILE_DEFAULTS = {
    "metric": "taylor", "categories": "labels", "features": "pixel", "ranking": "magnitude",
}  # fmt: skip
"""What NSSPruner's arguments of the profile are, where they are not given."""

DEPRECATED = {
    "ch_sparsity": "pruning_ratio",
    "ch_sparsity_dict": "pruning_ratio_dict",
    "channel_groups": "out_channel_groups",
}


@dataclass(frozen=True)
class Aim:
    """How much is to go over all steps; one of theta, ratio, budgets and quality is given.

    Attributes:
        theta: The similarity threshold.
        ratio: Share of the neurons to remove, in [0, 1).
        budgets: Shares of the costs to keep, in (0, 1]; all of them hold.
        quality: How good the smaller model must be.
        costs: What each budget is a share of, or the one that ``quality`` makes least.
    """

    theta: float | None = None
    ratio: float | None = None
    budgets: tuple[float, ...] = ()
    quality: Quality | None = None
    costs: tuple[Cost, ...] = ()


def find_aim(
    theta: float | None,
    ratio: float | None,
    kept: Sequence[float | None],
    budget: float | None,
    cost: CostSpec | None,
    importance: Any,
    wanted: tuple[float | None, Score | None, float | None, float | None] = (None,) * 4,
) -> Aim:
    """What the arguments ask for.

    Args:
        kept: The shares of :data:`BUDGETS`, in their order.
        wanted: As :func:`nss_prune.pruner.quality.find_quality` takes them.

    Raises:
        ArgumentError: They ask for several things, or for one that is outside what it may be.
    """
    quality = find_quality(*wanted)
    if ratio is not None and not 0 <= ratio < 1:
        raise ArgumentError(
            f"pruning_ratio is {ratio!r}; it is the share to remove, in [0, 1); to go on step by "
            "step until a model is fast enough, give 0.95 and iterative_steps=, or latency_budget="
        )
    budgets = _budgets(kept, budget, cost, quality)
    asked = _asked(ratio, budgets, quality)
    if ratio is not None and len(asked) > 1:
        raise ArgumentError(f"{', '.join(asked)}; give one of them, or none and theta")
    if quality is not None and len(asked) > 1:
        raise ArgumentError(
            f"{', '.join(asked)}: the first says how much goes, and so do the others; leave one "
            "out, and say by cost= what is to be least"
        )
    if theta is not None and (asked or importance is not None):
        named = ", ".join(asked) or "importance="
        raise ArgumentError(f"theta={theta!r} has no effect with {named}; leave one of them out")
    if quality is not None:
        return Aim(quality=quality, costs=(cost_named("macs" if cost is None else cost),))
    if budgets:
        shares, costs = zip(*budgets.values(), strict=True)
        return Aim(budgets=shares, costs=costs)
    if ratio is None and importance is None:
        return Aim(theta=check_theta(THETA if theta is None else theta))
    return Aim(ratio=DEFAULT_RATIO if ratio is None else ratio)


def _budgets(
    kept: Sequence[float | None],
    budget: float | None,
    cost: CostSpec | None,
    quality: Quality | None,
) -> dict[str, tuple[float, Cost]]:
    """Argument -> share to keep, and of what."""
    given = {n: share for n, share in zip(BUDGETS, kept, strict=True) if share is not None}
    found = {name: (share, BUDGETS[name]()) for name, share in given.items()}
    if quality is None and (budget is None) != (cost is None):
        raise ArgumentError(
            f"budget={budget!r} with cost={cost!r}; give both, the share to keep and an object "
            "that says of what, or params_budget=, macs_budget= or latency_budget="
        )
    if budget is not None:
        found["budget"] = (budget, cost_named("macs" if cost is None else cost))
    for name, (share, _) in found.items():
        if not 0 < share <= 1:
            raise ArgumentError(f"{name} is {share!r}; it is the share to keep, in (0, 1]")
    return found


def _asked(
    ratio: float | None, budgets: Mapping[str, tuple[float, Cost]], quality: Quality | None
) -> list[str]:
    """The arguments that say how much goes, as they were given."""
    asked = [] if ratio is None else [f"pruning_ratio={ratio}"]
    if quality is not None:
        limits = ("max_divergence", "min_score", "max_drop")
        values = {name: getattr(quality, name) for name in limits}
        asked += [f"{name}={value}" for name, value in values.items() if value is not None]
    return asked + [f"{name}={share}" for name, (share, _) in budgets.items()]


def own_arguments(model: nn.Module, arguments: Mapping[str, Any], aim: Aim) -> dict[str, Any]:
    """Copies of what torch-pruning would change, in the forms that it understands.

    Raises:
        ArgumentError: torch-pruning has no such argument, it has no effect, or ignored_layers
            names a stranger.
    """
    known = set(PARAMETERS) - {"self"}
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
    if set(own["num_heads"]) - set(model.modules()):
        raise ArgumentError("num_heads has layers that are not in the model; give its own")
    _check_numbers(model, own)
    own["ignored_layers"] = resolve_layers(model, own.get("ignored_layers"))
    unwrapped = own.get("unwrapped_parameters") or ()
    pairs = unwrapped.items() if isinstance(unwrapped, Mapping) else unwrapped
    own["unwrapped_parameters"] = [tuple(pair) for pair in pairs]
    if aim.ratio is not None:
        own["pruning_ratio"] = aim.ratio
    own["round_to"] = check_round_to(own.get("round_to", AUTO if aim.budgets else None))
    return own


def _check_numbers(model: nn.Module, own: Mapping[str, Any]) -> None:
    """Raise on numbers that torch-pruning would fail on later, or take for others."""
    for name, module in model.named_modules():
        heads = own["num_heads"].get(module, 1)
        width = side_width(module, "out", None) or heads
        if not isinstance(heads, int) or heads < 1 or width % heads:
            raise ArgumentError(
                f"num_heads of {name} is {heads!r}, which its {width} channels are not a multiple "
                "of; give its number of heads"
            )
    steps = own.get("iterative_steps", 1)
    if not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"iterative_steps is {steps!r}; give a whole number from 1")
    most = own.get("max_pruning_ratio", 1.0)
    if not 0 < most <= 1:
        raise ArgumentError(
            f"max_pruning_ratio is {most!r}; it is the share that a layer may lose, in (0, 1]"
        )


def refuse_without_profile(strategy: Any, importance: Any, given: Sequence[Any]) -> None:
    """Raise on arguments of the semantic profile where something else ranks the neurons.

    Args:
        given: The values of :data:`PROFILE_DEFAULTS`, in their order.
    """
    if importance is not None and not callable(importance):
        raise ArgumentError(
            f"importance is {importance!r}; give an importance of torch_pruning, such as "
            "tp.importance.GroupMagnitudeImportance()"
        )
    if importance is None and strategy != "divergence":
        return
    ranks = "strategy='divergence'" if importance is None else "importance="
    for (name, default), value in zip(PROFILE_DEFAULTS.items(), given, strict=True):
        if value != default:
            raise ArgumentError(
                f"{name}={value!r} has no effect with {ranks}, which ranks the neurons by "
                "something else than a semantic profile; leave it out"
                + (", or give strategy='semantic'" if importance is None else "")
            )


def is_uniform(arguments: Mapping[str, Any]) -> bool:
    """Whether torch-pruning's arguments leave a ratio the same for all layers and steps."""
    others = ("pruning_ratio_dict", "iterative_pruning_ratio_scheduler")
    return not any(arguments.get(name) for name in others)


def _refuse_what_has_no_effect(arguments: Mapping[str, Any], aim: Aim) -> None:
    for name, instead in DEPRECATED.items():
        if arguments.get(name) not in (None, {}):
            raise ArgumentError(f"{name} is torch-pruning's old name; give {instead}= instead")
    _refuse_heads_without_effect(arguments, aim)
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


def _refuse_heads_without_effect(arguments: Mapping[str, Any], aim: Aim) -> None:
    if arguments.get("prune_head_dims") and not aim.budgets:
        raise ArgumentError(
            "prune_head_dims=True has no effect here: dimensions inside heads go within a budget, "
            "by what data shows; give macs_budget= or params_budget= with data=, or whole heads "
            "by prune_num_heads=True with head_pruning_ratio="
        )
    for name in ("head_pruning_ratio", "head_pruning_ratio_dict"):
        if arguments.get(name) and not arguments.get("prune_num_heads"):
            raise ArgumentError(f"{name} has no effect without prune_num_heads=True; give both")


def check_strategy(strategy: Any, aim: Aim, importance: Any, predicts: bool) -> None:
    """Raise where a strategy is none of those that there are, or does not suit what is asked for.

    Args:
        predicts: Whether there are a budget or a quality.
    """
    if aim.quality is not None:
        _check_quality(strategy, importance, predicts)
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
            "strategy='divergence' allocates a budget: give macs_budget=, "
            "params_budget= or latency_budget=, and no importance="
        )
    if strategy in ("category", "global") and (aim.ratio is None or importance is not None):
        raise ArgumentError(
            f"strategy={strategy!r} takes a share of the ranking: give pruning_ratio=, and no "
            "importance="
        )


def _check_quality(strategy: Any, importance: Any, predicts: bool) -> None:
    if importance is not None or not predicts:
        raise ArgumentError(
            "max_divergence= and score= choose the size from what data predicts: give data= and no "
            "importance="
        )
    if strategy != "divergence":
        raise ArgumentError(
            f"strategy={strategy!r} does not predict how the outputs change, which "
            "max_divergence= and score= need: leave strategy=, loss= and profile= out"
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


def check_steps(steps: int, importance: Any, data: Any, profile: Any, aim: Aim) -> None:
    """Raise where only the first of several steps has a profile, and the others need one.

    Likewise where each of several steps would be as large as quality allows.
    """
    if steps > 1 and aim.quality is not None:
        raise ArgumentError(
            f"iterative_steps is {steps} with max_divergence= or score=, which are about the one "
            "step from the whole model; leave iterative_steps out"
        )
    if aim.quality is not None and data is None:
        raise ArgumentError(
            "max_divergence= and score= choose the size from what data predicts; give data="
        )
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
    for name in ("iterative_steps", "round_to", "max_pruning_ratio", "global_pruning"):
        setattr(pruner, name, arguments.get(name, PARAMETERS[name].default))
    pruner.model, pruner.importance, pruner.DG = model, importance, None
    pruner.num_heads, pruner.current_step = arguments["num_heads"], 0


def unwrapped(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """The model inside what compiles it and wraps it for several devices, and the latter, or None.

    Raises:
        ArgumentError: Weights are masked, parametrized, or sharded over devices.
    """
    refuse_sharded(model)
    refuse_reparametrised(model)
    model = uncompiled(model)
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return uncompiled(model.module), model
    return model, None


class WithoutRegularizer(tp.pruner.BasePruner):  # type: ignore[misc]
    """torch-pruning's pruner, of which the regularizers are refused in words."""

    def regularize(self, *arguments: Any, **keywords: Any) -> NoReturn:
        """Raise ArgumentError: there is no sparse training here."""
        raise ArgumentError(
            "NSSPruner does not regularize, it removes neurons from a trained model; for sparse "
            "training use tp.pruner.GroupNormPruner or BNScalePruner, and then this one with "
            "importance="
        )

    update_regularizer = regularize


def by_position(values: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """torch-pruning's arguments after ``importance``, given by position, and those by name.

    Raises:
        ArgumentError: There are too many, or one is given twice.
    """
    given = dict(zip(AFTER_IMPORTANCE, values, strict=False))
    twice = [name for name in given if name in named]
    if twice or len(values) > len(AFTER_IMPORTANCE):
        raise ArgumentError(
            f"{len(values)} arguments after importance by position, {', '.join(twice) or 'none'} "
            f"also by name; torch-pruning's are {', '.join(AFTER_IMPORTANCE)}: give them by name"
        )
    return {**given, **named}


def as_called(model: nn.Module, inputs: Any, forward: Forward | None = None) -> Any:
    """The inputs of a call; a list of tensors that is one argument of the model in a tuple.

    Args:
        forward: What calls the model with the inputs as they are, if it is not called itself.
    """
    if (
        forward is not None
        or type(inputs) is not list
        or not all(isinstance(item, Tensor) for item in inputs)
    ):
        return inputs
    with evaluation(model), torch.no_grad():
        for arguments in (inputs, (inputs,)):
            with contextlib.suppress(Exception):
                model(*arguments)
                return arguments
    return inputs
