"""Eliminations as evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from nss_prune.allocation.elimination import Elimination
from nss_prune.allocation.interactions import Interactions, Predictor
from nss_prune.pruner.strategy import Evidence


@dataclass(frozen=True, kw_only=True)
class EliminationEvidence(Evidence):
    """Layer -> its neurons in the order of backward elimination, and what that causes.

    Attributes:
        interactions: What the layers do to the outputs together; without parts where nothing was
            measured.
        halves: What was observed of either half of the data, where that is asked for.
    """

    eliminations: dict[str, Elimination]
    interactions: Interactions = field(default_factory=Interactions)
    halves: tuple[EliminationEvidence, ...] = ()

    @cached_property
    def predictor(self) -> Predictor:
        """The predicted divergence of any slice."""
        return Predictor(self.eliminations, self.interactions)
