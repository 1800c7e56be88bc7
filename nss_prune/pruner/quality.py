"""How good the smaller model must be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nss_prune.errors import ArgumentError
from nss_prune.pruner.eliminating import Eliminating
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.strategy import Score, Strategy
from nss_prune.pruner.within_divergence import WithinDivergence
from nss_prune.pruner.within_score import WithinScore


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
        assert self.score is not None
        limits = (("max_drop", self.max_drop), ("min_score", self.min_score))
        asked = next(f"{name} {value:g}" for name, value in limits if value is not None)
        return WithinScore(eliminating, self.score, self.least, asked, tuple(repairs))

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
