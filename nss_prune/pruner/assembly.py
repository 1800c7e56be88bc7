"""The arguments of NSSPruner -> its strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nss_prune.core.thread_state import outside_inference_mode
from nss_prune.core.undo import left_as_found
from nss_prune.pruner.arguments import Aim, check_strategy, refuse_without_profile
from nss_prune.pruner.eliminating import Eliminating
from nss_prune.pruner.given import Given as Given
from nss_prune.pruner.observation import Profiling
from nss_prune.pruner.profile_evidence import ProfileEvidence
from nss_prune.pruner.ranking import Ranking
from nss_prune.pruner.repair import Repair
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
from nss_prune.pruner.strategy import Evidence, Importance, Observer, Strategy
from nss_prune.pruner.subject import Subject


def chosen_strategy(
    strategy: Any,
    aim: Aim,
    importance: Importance | None,
    plain: bool,
    of_profile: Sequence[Any],
) -> Any:
    """The name of a strategy, or an object.

    Args:
        strategy: None for the default.
        plain: Whether something is given that only a profile can be made with, or of.
        of_profile: Metric, categories, features and ranking.

    Raises:
        ArgumentError: It does not suit what is asked for.
    """
    predicts = bool(aim.budgets) or aim.quality is not None
    if strategy is None:
        best = predicts and not plain and importance is None
        strategy = "divergence" if best else "semantic"
    check_strategy(strategy, aim, importance, predicts)
    refuse_without_profile(strategy, importance, of_profile)
    return strategy


def strategy_for(
    strategy: Any,
    aim: Aim,
    importance: Importance | None,
    profiling: Profiling,
    pruner: Any,
    sizes: Mapping[str, int],
    inside_heads: bool = True,
    repairs: Sequence[Repair] = (),
    outputs: Any = None,
) -> Strategy[Any]:
    """The object behind a name, or the object itself.

    Args:
        pruner: torch-pruning's, whose own ranking decides where there is a ratio.
        sizes: Layer -> neurons before the first step.
        inside_heads: Whether dimensions inside heads may go.
        repairs: Around a removal, for a score that is measured with them.
        outputs: What the outputs mean.
    """
    if not isinstance(strategy, str):
        return strategy  # type: ignore[no-any-return]
    if strategy == "divergence":
        eliminating = Eliminating(
            profiling.data, profiling.keeps_statistics, outputs, profiling.upkeep, inside_heads
        )
        if aim.quality is not None:
            return aim.quality.strategy(eliminating, repairs)
        return DivergenceStrategy(eliminating)
    if strategy in ("category", "global"):
        return ShareStrategy(profiling, strategy)
    if aim.budgets:
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


@outside_inference_mode
def observed(strategy: Observer, subject: Subject, given: ProfileEvidence | None) -> Evidence:
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
