"""The strategy that finds the smallest model that scores well enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nss_prune.allocation.budget import Limits
from nss_prune.allocation.path import Path, smallest_passing, whole
from nss_prune.core.processes import gathered
from nss_prune.core.undo import Snapshot
from nss_prune.errors import NumericalError
from nss_prune.graph.slices import Slice
from nss_prune.pruner.eliminating import ByElimination
from nss_prune.pruner.elimination_evidence import EliminationEvidence
from nss_prune.pruner.plan import to_bases_of
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.strategy import Measure, Score, Target
from nss_prune.pruner.subject import Subject


@dataclass(frozen=True)
class WithinScore(ByElimination):
    """The smallest model whose measured score stays within a limit.

    Slices are nested, along a path whose costs are those of the half-sized model, and tried by
    bisection: repaired, and masked where nothing is repaired after the removal.

    Attributes:
        score: Of a model.
        least: Function of the whole model's score that gives the least that will do.
        asked: For what, in words.
        repairs: Around the removal.
    """

    score: Score
    least: Callable[[float], float]
    asked: str
    repairs: tuple[Repair, ...] = ()

    def measuring(self, subject: Subject, evidence: EliminationEvidence) -> Measure:
        """What measures the score of a slice, the mean of those in all processes."""
        seen = [repair.observe(subject, evidence) for repair in self.repairs]
        return lambda critical: self._measured(subject, evidence, critical, seen)

    def select(
        self,
        subject: Subject,
        evidence: EliminationEvidence,
        target: Target,
        limits: Limits,
        measure: Measure | None = None,
    ) -> Slice:
        """The smallest of nested slices.

        Raises:
            ArgumentError: The whole model does not score as much.
            NumericalError: A score is NaN.
        """
        assert target.share is not None
        measure = measure or self.measuring(subject, evidence)
        share, found = target.share, evidence.eliminations
        scores: dict[tuple[int, ...], float] = {}

        def score(critical: Slice) -> float:
            sizes = tuple(int(kept.sum()) for kept in critical.kept.values())
            if sizes not in scores:
                scores[sizes] = measure(critical)
            return scores[sizes]

        everything = whole(subject.groups)
        before = score(everything)
        least = self.least(before)
        first = Path(subject.groups, found, share, limits)
        half = first.slice(first.within(0.5))
        path = Path(subject.groups, found, share, limits, half)
        chosen = smallest_passing(path, lambda critical: score(critical) >= least)
        reached = f"score {score(chosen):.6g}, the whole model's {before:.6g}"
        return replace(chosen, rule=f"{self.asked} ({reached}, {len(scores)} models measured)")

    def _measured(
        self,
        subject: Subject,
        evidence: EliminationEvidence,
        critical: Slice,
        seen: Sequence[Any],
    ) -> float:
        """The score of a slice; the model is put back."""
        model, before = subject.model, Snapshot(subject.model)
        known = list(zip(self.repairs, seen, strict=True))
        try:
            to_bases_of(model, critical, evidence.bases)
            for repair, what in known:
                repair.before(subject, critical, what)
            if all(getattr(repair, "before_removal", False) for repair in self.repairs):
                with critical.masked(model):
                    found = float(self.score(model))
            else:
                subject.remove(model, critical)
                for repair, what in known:
                    repair.after(subject, critical, what)
                found = float(self.score(model))
        finally:
            before.restore()
        everywhere = gathered(found)
        mean = sum(everywhere) / len(everywhere)
        if math.isnan(mean):
            raise NumericalError("score= gives NaN; check the function and its data")
        return mean
