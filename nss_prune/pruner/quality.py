"""How good the smaller model must be, and the strategies that find the smallest such model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nss_prune.allocation.budget import Limits, ShareOf
from nss_prune.allocation.path import Path, smallest_passing, whole, within_divergence
from nss_prune.core.undo import Snapshot
from nss_prune.errors import ArgumentError, NumericalError
from nss_prune.graph.bases import change_basis
from nss_prune.graph.slices import Slice
from nss_prune.pruner.eliminating import ByElimination, Eliminating
from nss_prune.pruner.elimination_evidence import EliminationEvidence
from nss_prune.pruner.measuring import Measuring
from nss_prune.pruner.plan import bases_of
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.strategy import Score, Strategy, Target
from nss_prune.pruner.subject import Subject

ROUNDS = 6  # of measuring a slice, and predicting for less where it exceeds its limit
NEAR = 0.8  # share of the limit from which no better slice is looked for


@dataclass(frozen=True)
class Quality:
    """How good the smaller model must be: by its divergence, or by a score.

    Attributes:
        max_divergence: Predicted divergence of the outputs, in nats a sample, at most.
        score: Of a model.
        min_score: That of the smaller model, at least.
        max_drop: What the whole model's score may exceed it by, in units of the score.
    """

    max_divergence: float | None = None
    score: Score | None = None
    min_score: float | None = None
    max_drop: float | None = None

    def strategy(self, eliminating: Eliminating, repairs: Sequence[Repair]) -> Strategy[Any]:
        """What finds the smallest model."""
        if self.max_divergence is not None:
            return WithinDivergence(eliminating, self.max_divergence, tuple(repairs))
        return WithinScore(eliminating, self, tuple(repairs))

    def least(self, before: float) -> float:
        """The least score that will do.

        Args:
            before: The whole model's.

        Raises:
            ArgumentError: The whole model's is less.
        """
        if self.max_drop is not None:
            return before - self.max_drop
        assert self.min_score is not None
        if before < self.min_score:
            raise ArgumentError(
                f"min_score is {self.min_score}, and the whole model scores {before:.6g}; give at "
                "most this, or max_drop="
            )
        return self.min_score


def find_quality(
    max_divergence: float | None,
    score: Score | None,
    min_score: float | None,
    max_drop: float | None,
) -> Quality | None:
    """What NSSPruner's arguments ask for; None for nothing of the kind.

    Raises:
        ArgumentError: They contradict each other, or one is outside what it may be.
    """
    for name, value in (("max_divergence", max_divergence), ("max_drop", max_drop)):
        if value is not None and not 0 <= value < math.inf:
            raise ArgumentError(f"{name} is {value!r}; give a number, 0 or above")
    limits = [name for name, value in (("min_score", min_score), ("max_drop", max_drop))
              if value is not None]  # fmt: skip
    if max_divergence is not None and (score is not None or limits):
        raise ArgumentError(
            f"max_divergence={max_divergence} and {limits[0] if limits else 'score'}=: the size is "
            "chosen by one of them; leave the other out"
        )
    if (score is None) != (not limits):
        given = "score=" if score is not None else f"{limits[0]}="
        raise ArgumentError(
            f"{given} is given alone; give score=, a function of the model, and min_score= or "
            "max_drop="
        )
    if len(limits) > 1:
        raise ArgumentError("min_score= and max_drop= are both given; leave one of them out")
    if min_score is not None and not math.isfinite(min_score):
        raise ArgumentError(f"min_score is {min_score!r}; give a number")
    if score is not None and not callable(score):
        raise ArgumentError(
            f"score is a {type(score).__name__}; give a function of the model that returns a "
            "number, larger for better"
        )
    found = Quality(max_divergence, score, min_score, max_drop)
    return None if found == Quality() else found


@dataclass(frozen=True)
class WithinDivergence(ByElimination):
    """The smallest model whose predicted divergence stays within a limit.

    The prediction is of second order, and too small where the outputs are very sure. So it is
    checked by measuring the slice found, and a smaller divergence is predicted for where more is
    measured than the limit.

    Attributes:
        most: In nats a sample.
        repairs: Around the removal.
    """

    most: float
    repairs: tuple[Repair, ...] = ()

    def select(
        self, subject: Subject, evidence: EliminationEvidence, target: Target, limits: Limits
    ) -> Slice:
        """The smallest of nested slices."""
        predictor, share = evidence.predictor, _share(target)

        def predicted_within(most: float) -> Slice:
            return within_divergence(
                subject.groups, evidence.eliminations, predictor, most, share, limits
            )

        measuring = Measuring(subject, evidence, self.eliminating, self.repairs)
        if measuring.possible:
            chosen, found = self._checked(predicted_within, measuring)
            measured = f", measured {found:.4g}"
        else:
            chosen, measured = predicted_within(self.most), ""
        rule = f"max_divergence {self.most:g} (predicted {predictor.of(chosen):.4g} nats{measured})"
        return replace(chosen, rule=rule)

    def _checked(
        self, predicted_within: Callable[[float], Slice], measuring: Measuring
    ) -> tuple[Slice, float]:
        """The smallest slice found that is measured within the limit, and what is measured.

        Where none is, the largest that was tried.
        """
        most, failing, passing = self.most, 0.0, 0.0
        best: tuple[Slice, float] | None = None
        for _ in range(ROUNDS):
            last = predicted_within(most)
            found = measuring.divergence(last)
            if found > self.most:
                failing = most
            else:
                passing, best = most, (last, found)
            if best is not None and (not failing or found > NEAR * self.most >= NEAR * found):
                break
            most = math.sqrt(passing * failing) if passing else most * self.most / found
        return best or (last, found)


@dataclass(frozen=True)
class WithinScore(ByElimination):
    """The smallest model whose measured score stays within a limit.

    Slices are nested, along a path whose costs are those of the half-sized model, and tried by
    bisection: repaired, and masked where nothing is repaired after the removal.

    Attributes:
        quality: With a score.
        repairs: Around the removal.
    """

    quality: Quality
    repairs: tuple[Repair, ...] = ()

    def select(
        self, subject: Subject, evidence: EliminationEvidence, target: Target, limits: Limits
    ) -> Slice:
        """The smallest of nested slices.

        Raises:
            ArgumentError: The whole model does not score as much.
            NumericalError: A score is NaN.
        """
        share, found = _share(target), evidence.eliminations
        seen = [repair.observe(subject, evidence) for repair in self.repairs]
        scores: dict[tuple[int, ...], float] = {}

        def score(critical: Slice) -> float:
            sizes = tuple(int(kept.sum()) for kept in critical.kept.values())
            if sizes not in scores:
                scores[sizes] = self._measured(subject, evidence, critical, seen)
            return scores[sizes]

        everything = whole(subject.groups)
        before = score(everything)
        least = self.quality.least(before)
        first = Path(subject.groups, found, share, limits)
        half = first.slice(first.within(0.5))
        path = Path(subject.groups, found, share, limits, half)
        chosen = smallest_passing(path, lambda critical: score(critical) >= least)
        asked = (
            f"max_drop {self.quality.max_drop:g}"
            if self.quality.max_drop is not None
            else f"min_score {self.quality.min_score:g}"
        )
        reached = f"score {score(chosen):.6g}, the whole model's {before:.6g}"
        return replace(chosen, rule=f"{asked} ({reached}, {len(scores)} models measured)")

    def _measured(
        self,
        subject: Subject,
        evidence: EliminationEvidence,
        critical: Slice,
        seen: Sequence[Any],
    ) -> float:
        """The score of a slice; the model is put back."""
        assert self.quality.score is not None
        model, before = subject.model, Snapshot(subject.model)
        known = list(zip(self.repairs, seen, strict=True))
        try:
            change_basis(model, bases_of(critical, evidence.bases))
            for repair, what in known:
                repair.before(subject, critical, what)
            if all(getattr(repair, "before_removal", False) for repair in self.repairs):
                with critical.masked(model):
                    found = float(self.quality.score(model))
            else:
                subject.remove(model, critical)
                for repair, what in known:
                    repair.after(subject, critical, what)
                found = float(self.quality.score(model))
        finally:
            before.restore()
        if math.isnan(found):
            raise NumericalError("score= gives NaN; check the function and its data")
        return found


def _share(target: Target) -> ShareOf:
    assert target.share is not None
    return target.share
