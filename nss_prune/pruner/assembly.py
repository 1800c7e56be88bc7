"""The arguments of NSSPruner -> its strategy and its repairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from nss_prune.core.processes import processes
from nss_prune.core.undo import left_as_found
from nss_prune.pruner.arguments import (
    Aim,
    check_fold,
    check_repairs,
    check_repeatable,
    check_strategy,
)
from nss_prune.pruner.balancing import Balance
from nss_prune.pruner.eliminating import Eliminating
from nss_prune.pruner.observation import ProfileEvidence, Profiling
from nss_prune.pruner.ranking import Ranking
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.repairs import Fold, Recalibrate, Refit
from nss_prune.pruner.strategies import (
    BudgetByCriterion,
    BudgetByRanking,
    ByProfile,
    CriterionRatio,
    DivergenceStrategy,
    SemanticRatio,
    ShareStrategy,
    ThetaStrategy,
)
from nss_prune.pruner.strategy import Evidence, Importance, Strategy
from nss_prune.pruner.subject import Subject


def chosen_strategy(
    strategy: Any, aim: Aim, importance: Importance | None, data: Any, plain: bool
) -> Any:
    """The name of a strategy, or an object.

    Args:
        strategy: None for the default.
        plain: Whether something is given that only a profile can be made with, or of.

    Raises:
        ArgumentError: It does not suit what is asked for.
    """
    predicts = aim.budget is not None and data is not None and processes() == 1
    if strategy is None:
        best = predicts and not plain and importance is None
        strategy = "divergence" if best else "semantic"
    check_strategy(strategy, aim, importance, predicts)
    return strategy


def strategy_for(
    strategy: Any,
    aim: Aim,
    importance: Importance | None,
    profiling: Profiling,
    pruner: Any,
    sizes: Mapping[str, int],
    **settings: Any,
) -> Strategy[Any]:
    """The object behind a name, or the object itself.

    Args:
        pruner: torch-pruning's, whose own ranking decides where there is a ratio.
        sizes: Layer -> neurons before the first step.
        settings: As of :class:`nss_prune.pruner.eliminating.Eliminating`; None is left out.
    """
    if not isinstance(strategy, str):
        return strategy  # type: ignore[no-any-return]
    if strategy == "divergence":
        assert profiling.data is not None
        return DivergenceStrategy(
            Eliminating(profiling.data, profiling.keeps_statistics, **settings)
        )
    if strategy in ("category", "global"):
        return ShareStrategy(profiling, strategy)
    if aim.budget is not None:
        if importance is not None:
            return BudgetByCriterion(importance, pruner.global_pruning)
        return BudgetByRanking(profiling)
    if aim.theta is not None:
        return ThetaStrategy(profiling)
    ranking = Ranking(pruner, sizes)
    if importance is not None:
        return CriterionRatio(importance, ranking)
    return SemanticRatio(profiling, ranking)


def is_by_profile(strategy: Strategy[Any]) -> bool:
    """Whether the strategy selects by a profile."""
    return isinstance(strategy, ByProfile)


def observed(strategy: Strategy[Any], subject: Subject, given: ProfileEvidence | None) -> Evidence:
    """What a strategy observes of a subject.

    Args:
        given: A profile that was made before, which serves in the place of one made now.
    """
    if given is not None and isinstance(strategy, ByProfile):
        return given
    with left_as_found(subject.model):
        evidence: Evidence = strategy.observe(subject)
    if given is None or evidence.statistics is not None:
        return evidence
    notes = (*given.notes, *evidence.notes)
    return replace(evidence, statistics=given.statistics, notes=notes)


def repairs_for(
    data: Iterable[Any] | None,
    fold: bool | str,
    recalibrate: bool,
    balance: bool,
    more: Iterable[Repair],
    outputs: Any,
    progress: bool | None,
) -> tuple[Repair, ...]:
    """The repairs in their order.

    Raises:
        ArgumentError: One cannot work with the data, or lacks a method.
    """
    check_fold(fold, data)
    found: list[Repair] = []
    if fold == "refit":
        assert data is not None
        found.append(Refit(data, progress))
    elif fold:
        found.append(Fold(data, progress))
    if recalibrate:
        check_repeatable("recalibrate=True", data)
        assert data is not None
        found.append(Recalibrate(data, progress))
    if balance:
        check_repeatable("balance=True", data)
        assert data is not None
        found.append(Balance(data, progress, outputs))
    return (*found, *check_repairs(more))
