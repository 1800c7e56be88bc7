"""The figures of a plan, from the evidence that it was made by."""

from __future__ import annotations

from nss_prune.allocation.budget import Limits, ShareOf
from nss_prune.graph.slices import Slice
from nss_prune.pruner.elimination_evidence import EliminationEvidence
from nss_prune.pruner.figures import Figures, category_shares
from nss_prune.pruner.profile_evidence import ProfileEvidence
from nss_prune.pruner.sensitivity import SensitivityTable, sensitivity_of
from nss_prune.pruner.strategy import Evidence


def figures_of(
    evidence: Evidence,
    chosen: Slice,
    sensitivity: SensitivityTable | None,
    cost: str,
    kept: float | None,
) -> Figures:
    """What the evidence says of a slice.

    Args:
        sensitivity: Where it was predicted.
        cost: What a budget is a share of.
        kept: Share of it that the slice keeps.
    """
    if isinstance(evidence, ProfileEvidence):
        profile = evidence.profile
        contributions = profile.contributions[profile.metrics[0]]
        categories = category_shares(chosen, contributions, profile.categories)
        return Figures(cost, kept, categories=categories)
    if sensitivity is None or not isinstance(evidence, EliminationEvidence):
        return Figures(cost, kept)
    curve = tuple(sorted(sensitivity.curve))
    return Figures(cost, kept, evidence.predictor.of(chosen), curve, sensitivity.by_layer)


def predicted_sensitivity(
    evidence: Evidence, chosen: Slice, share: ShareOf, cost: str, limits: Limits
) -> SensitivityTable | None:
    """The sensitivity of the layers, where the evidence predicts it.

    Args:
        share: What a slice keeps of the cost of that name.
    """
    if not isinstance(evidence, EliminationEvidence):
        return None
    return sensitivity_of(evidence, chosen, share, cost, limits)
