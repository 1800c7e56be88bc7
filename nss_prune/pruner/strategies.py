"""The strategies: by θ, by a ratio, or within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nss_prune.allocation.budget import Limits, Scores, limited, solve
from nss_prune.allocation.divergence import allocate
from nss_prune.errors import NothingToPruneError
from nss_prune.graph.slices import Slice
from nss_prune.pruner.eliminating import ByElimination
from nss_prune.pruner.elimination_evidence import EliminationEvidence
from nss_prune.pruner.observation import Profiling
from nss_prune.pruner.profile_evidence import ProfileEvidence
from nss_prune.pruner.ranking import Asked, Ranking, importance_of
from nss_prune.pruner.schedule import Stage
from nss_prune.pruner.strategy import Evidence, Importance, Target
from nss_prune.pruner.subject import Subject


@dataclass(frozen=True)
class ByProfile:
    """What the strategies share that look at a profile.

    Attributes:
        profiling: How it is made.
    """

    profiling: Profiling

    def observe(self, subject: Subject) -> ProfileEvidence:
        """The profile, from one pass over the data."""
        return self.profiling.observe(subject)

    def stages(self, subject: Subject) -> list[Stage]:
        """The pass of the profile."""
        return self.profiling.stages(subject)


class ThetaStrategy(ByProfile):
    """The semantic slice at one θ for all layers (paper, Algorithm 1)."""

    def select(
        self, subject: Subject, evidence: ProfileEvidence, target: Target, limits: Limits
    ) -> Slice:
        """The critical neurons, and more where the limits ask for more."""
        critical = subject.restricted(evidence.profile.slice(target.theta))
        return limited(critical, limits, evidence.importance.scores.__getitem__)


@dataclass(frozen=True)
class ShareStrategy(ByProfile):
    """The same share of every layer (paper, section 2.3).

    Attributes:
        rule: "category", the best of each category and their union; "global", the best over all
            data.
    """

    rule: Any

    def select(
        self, subject: Subject, evidence: ProfileEvidence, target: Target, limits: Limits
    ) -> Slice:
        """The share, and more where the limits ask for more."""
        chosen = evidence.profile.slice(ratio=target.ratio, strategy=self.rule)
        scores = evidence.importance.scores.__getitem__
        return limited(subject.restricted(chosen), limits, scores)


@dataclass(frozen=True)
class SemanticRatio(ByProfile):
    """A ratio as torch-pruning's pruners take it, ranked by the semantic importance.

    Attributes:
        ranking: torch-pruning's own.
    """

    ranking: Ranking

    def select(
        self, subject: Subject, evidence: ProfileEvidence, target: Target, limits: Limits
    ) -> Slice:
        """What torch-pruning's ranking keeps, and more where the limits ask for more."""
        scores = evidence.importance.scores.__getitem__
        critical = self.ranking.slice(subject, evidence.importance, scores)
        return limited(critical, limits, scores)


@dataclass(frozen=True, kw_only=True)
class CriterionEvidence(Evidence):
    """What one of torch-pruning's criteria says; it is asked once for every group."""

    importance: Importance

    def scores(self, subject: Subject) -> Scores:
        """Layer -> importance of its neurons; zeros where the criterion says nothing."""
        groups = {group.name: group for group in subject.groups}

        def of(layer: str) -> Tensor:
            found = importance_of(subject, groups[layer], self.importance)
            return torch.zeros(groups[layer].size) if found is None else found

        return of


@dataclass(frozen=True)
class CriterionRatio:
    """A ratio as torch-pruning's pruners take it, ranked by one of its criteria.

    Attributes:
        importance: The criterion.
        ranking: torch-pruning's own.
    """

    importance: Importance
    ranking: Ranking

    def observe(self, subject: Subject) -> CriterionEvidence:
        """Nothing yet: the ranking asks."""
        return CriterionEvidence(neurons=subject.neurons, importance=Asked(self.importance))

    def select(
        self, subject: Subject, evidence: CriterionEvidence, target: Target, limits: Limits
    ) -> Slice:
        """What torch-pruning's ranking keeps, and more where the limits ask for more."""
        scores = evidence.scores(subject)
        critical = self.ranking.slice(subject, evidence.importance, scores)
        return limited(critical, limits, scores)


class BudgetByRanking(ByProfile):
    """The best neurons of all layers together, by semantic importance, within a budget."""

    def select(
        self, subject: Subject, evidence: ProfileEvidence, target: Target, limits: Limits
    ) -> Slice:
        """One threshold for all layers, as large a slice as the budget allows."""
        scores = evidence.importance.scores.__getitem__
        return _within_budget(subject, scores, target, limits)


@dataclass(frozen=True)
class BudgetByCriterion:
    """The best neurons by one of torch-pruning's criteria within a budget.

    Attributes:
        importance: The criterion.
        together: Whether one threshold serves all layers; otherwise each keeps the same share.
    """

    importance: Importance
    together: bool

    def observe(self, subject: Subject) -> CriterionEvidence:
        """Ask the criterion; layers of which it says nothing are left alone.

        Raises:
            NothingToPruneError: It says nothing of any layer.
        """
        asked = Asked(self.importance)
        silent = {
            group.name: "the importance says nothing of it"
            for group in subject.groups
            if importance_of(subject, group, asked) is None
        }
        neurons = subject.neurons.without(silent)
        if not neurons.groups:
            raise NothingToPruneError(f"no layer is left to prune: {neurons.left_alone}")
        return CriterionEvidence(neurons=neurons, importance=asked)

    def select(
        self, subject: Subject, evidence: CriterionEvidence, target: Target, limits: Limits
    ) -> Slice:
        """As large a slice as the budget allows."""
        scores = evidence.scores(subject)

        def shares(layer: str) -> Tensor:
            return _shares_below(scores(layer))

        chosen = scores if self.together else shares
        return _within_budget(subject, chosen, target, limits, fill=self.together)


@dataclass(frozen=True)
class DivergenceStrategy(ByElimination):
    """As many neurons of each layer as make the outputs diverge least within a budget.

    See :mod:`nss_prune.allocation.divergence`.
    """

    def select(
        self, subject: Subject, evidence: EliminationEvidence, target: Target, limits: Limits
    ) -> Slice:
        """The slice of least divergence that the budget allows."""
        assert target.budget is not None
        assert target.share is not None
        critical, _ = allocate(
            subject.groups, evidence.eliminations, target.budget, target.share, limits
        )
        return critical


def _within_budget(
    subject: Subject, scores: Scores, target: Target, limits: Limits, *, fill: bool = True
) -> Slice:
    assert target.budget is not None
    assert target.share is not None
    critical, _ = solve(subject.groups, scores, target.budget, target.share, limits, fill=fill)
    return critical


def _shares_below(scores: Tensor) -> Tensor:
    """The share of a layer's neurons that go before each or with it, in (0, 1], ``[neurons]``."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    order = scores.argsort(stable=True)
    ranks[order] = torch.arange(1, len(scores) + 1, dtype=torch.float64) / len(scores)
    return ranks
