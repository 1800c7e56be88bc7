"""The strategy that finds the smallest model whose outputs diverge little enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from nss_prune.allocation.budget import Limits
from nss_prune.allocation.path import within_divergence
from nss_prune.graph.slices import Slice
from nss_prune.pruner.eliminating import ByElimination
from nss_prune.pruner.elimination_evidence import EliminationEvidence
from nss_prune.pruner.halves import NewSamples, halves_of
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.strategy import Measure, Target
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import Stage

ROUNDS = 6  # of measuring a slice, and predicting for less where it exceeds its limit
NEAR = 0.8  # share of the limit from which no better slice is looked for


@dataclass(frozen=True)
class WithinDivergence(ByElimination):
    """The smallest model whose predicted divergence stays within a limit.

    The prediction is of second order, and too small where the outputs are very sure. So it is
    checked by measuring the slice found, and a smaller divergence is predicted for where more is
    measured than the limit. What is measured is an estimate for new samples, by halves of the data
    (:mod:`nss_prune.pruner.halves`), for which all is observed of either half as well.

    Attributes:
        most: In nats a sample.
        repairs: Around the removal.
    """

    most: float
    repairs: tuple[Repair, ...] = ()

    def observe(self, subject: Subject) -> EliminationEvidence:
        """The eliminations by all samples, and by either half of them."""
        eliminating = self.eliminating
        evidence = eliminating.observe(subject)
        upkeep = replace(eliminating.upkeep, checkpoint=None)
        halves = tuple(
            replace(eliminating, data=half, upkeep=upkeep).observe(subject)
            for half in halves_of(eliminating.data)
        )
        return replace(evidence, halves=halves)

    def stages(self, subject: Subject) -> list[Stage]:
        """The passes of the eliminations, over all data and over either half."""
        own = self.eliminating.stages(subject)
        if not halves_of(self.eliminating.data):
            return own
        return [
            *own,
            *(replace(one, passes=2 * one.passes, weight=one.weight / 2) for one in own),
        ]

    def measuring(self, subject: Subject, evidence: EliminationEvidence) -> Measure | None:
        """What estimates the divergence of a slice, in nats a sample; None without data."""
        measuring = NewSamples(subject, evidence, self.eliminating, self.repairs)
        return measuring.divergence if measuring.possible else None

    def select(
        self,
        subject: Subject,
        evidence: EliminationEvidence,
        target: Target,
        limits: Limits,
        measure: Measure | None = None,
    ) -> Slice:
        """The smallest of nested slices."""
        assert target.share is not None
        predictor, share = evidence.predictor, target.share

        def predicted_within(most: float) -> Slice:
            return within_divergence(
                subject.groups, evidence.eliminations, predictor, most, share, limits
            )

        if measure is not None:
            chosen, found = self._checked(predicted_within, measure)
            measured = f", measured {found:.4g}"
        else:
            chosen, measured = predicted_within(self.most), ""
        rule = f"max_divergence {self.most:g} (predicted {predictor.of(chosen):.4g} nats{measured})"
        return replace(chosen, rule=rule)

    def _checked(
        self, predicted_within: Callable[[float], Slice], measure: Measure
    ) -> tuple[Slice, float]:
        """The smallest slice found that is measured within the limit, and what is measured.

        Where none is, the largest that was tried.
        """
        most, failing, passing = self.most, 0.0, 0.0
        best: tuple[Slice, float] | None = None
        for _ in range(ROUNDS):
            last = predicted_within(most)
            found = measure(last)
            if found > self.most:
                failing = most
            else:
                passing, best = most, (last, found)
            if best is not None and (not failing or found > NEAR * self.most >= NEAR * found):
                break
            most = math.sqrt(passing * failing) if passing else most * self.most / found
        return best or (last, found)
