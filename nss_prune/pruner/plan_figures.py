"""The figures of a plan, from the evidence that it was made by."""

from __future__ import annotations

from nss_prune.allocation.budget import Limits
from nss_prune.allocation.divergence import predicted
from nss_prune.graph.slices import Slice
from nss_prune.pruner.eliminating import EliminationEvidence
from nss_prune.pruner.figures import (
    Figures,
    category_shares,
    divergence_curve,
    sensitivity_table,
)
from nss_prune.pruner.observation import ProfileEvidence
from nss_prune.pruner.strategy import Evidence, Target
from nss_prune.pruner.subject import Subject


def figures_of(
    subject: Subject,
    evidence: Evidence,
    chosen: Slice,
    target: Target,
    limits: Limits,
    cost: str = "",
) -> Figures:
    """What the evidence says of a slice.

    Args:
        cost: What a budget is a share of.
    """
    kept = None if target.share is None else target.share(chosen)
    if isinstance(evidence, ProfileEvidence):
        profile = evidence.profile
        contributions = profile.contributions[profile.metrics[0]]
        categories = category_shares(chosen, contributions, profile.categories)
        return Figures(cost, kept, categories=categories)
    if not isinstance(evidence, EliminationEvidence) or target.share is None:
        return Figures(cost, kept)
    names = {group.name for group in subject.groups}
    found = {name: one for name, one in evidence.eliminations.items() if name in names}
    curve = divergence_curve(subject.groups, found, target.share, limits)
    return Figures(cost, kept, predicted(chosen, found), curve, sensitivity_table(found))
