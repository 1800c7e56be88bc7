"""The repair of the running statistics of BatchNorms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nss_prune.compensation.recalibration import (
    NormStatistics,
    kept_statistics,
    norm_statistics,
    recalibrate,
    running_norms,
)
from nss_prune.core.batches import has_samples
from nss_prune.graph.slices import Slice
from nss_prune.pruner.arguments import Aim
from nss_prune.pruner.cost import MACs
from nss_prune.pruner.repair import Repaired
from nss_prune.pruner.schedule import FORWARD, Stage
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import DEFAULT, Records, Upkeep

MOST_KEPT = 0.7
"""Share of the MACs up to which recalibration is on unless it is said: above, it changes little."""

LEAST_SAMPLES = 500
"""Of the data for that; with fewer it was not measured, see docs/howto/accuracy.md."""

BY_DEFAULT = (
    f"the BatchNorms were recalibrated, as by default for {MOST_KEPT:g} of the MACs or less with "
    f"{LEAST_SAMPLES} samples or more; recalibrate=False leaves it out"
)
TOO_FEW = (
    f"the BatchNorms were not recalibrated: there are fewer than {LEAST_SAMPLES} samples; "
    "recalibrate=True does it with those"
)


def recalibrates(given: bool | None, aim: Aim, fold: bool | str) -> bool | None:
    """Whether to recalibrate: as given, or else None where :data:`LEAST_SAMPLES` decide.

    They do where a MACs budget is at most :data:`MOST_KEPT`, and the removal is not the plain one.
    """
    if given is not None or not fold:
        return bool(given)
    shares = zip(aim.budgets, aim.costs, strict=False)  # a quality has a cost without a share
    deep = any(isinstance(cost, MACs) and share <= MOST_KEPT for share, cost in shares)
    return None if deep else False


@dataclass(frozen=True)
class Recalibrate:
    """Moves the running statistics of BatchNorms as far as those of the data moved.

    See :mod:`nss_prune.compensation.recalibration`.

    Attributes:
        data: Batches that can be iterated again.
        upkeep: What the passes may take, keep and show.
        by_default: Nobody asked for it: only with enough samples, and the report says so.
    """

    data: Iterable[Any]
    upkeep: Upkeep = DEFAULT
    by_default: bool = False

    def observe(self, subject: Subject, evidence: Evidence) -> dict[str, NormStatistics]:
        """What the BatchNorms see in the whole model; nothing where they stay as they are."""
        if not self._wanted(subject):
            return {}
        kinds, asked = {"norms": NormStatistics}, subject.layers
        make = partial(self._seen, subject)
        return self.upkeep.recalled("norms", subject.model, self.data, asked, kinds, make)["norms"]

    def stages(self, subject: Subject, before: Sequence[Stage]) -> list[Stage]:
        """A pass before the removal, and one after it."""
        return [Stage("recalibration", 2, FORWARD)] if self._wanted(subject) else []

    def _wanted(self, subject: Subject) -> bool:
        if not running_norms(subject.model):
            return False
        return not self.by_default or has_samples(self.data, LEAST_SAMPLES)

    def _seen(self, subject: Subject) -> Records:
        progress = self.upkeep.progress
        found = norm_statistics(subject.model, self.data, progress=progress, **subject.calling)
        return {"norms": found}

    def before(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Nothing yet."""
        return Repaired()

    def after(self, subject: Subject, chosen: Slice, seen: dict[str, NormStatistics]) -> Repaired:
        """Recalibrate, where there is a norm."""
        if seen:
            kept = kept_statistics(seen, chosen)
            recalibrate(
                subject.model,
                self.data,
                whole=kept,
                progress=self.upkeep.progress,
                **subject.calling,
            )
        return Repaired(self._notes(subject, bool(seen)))

    def _notes(self, subject: Subject, done: bool) -> tuple[str, ...]:
        """What was not asked for, or asked for in vain."""
        if not running_norms(subject.model):
            none = "nothing was recalibrated: the model has no BatchNorm"
            return () if self.by_default else (none,)
        if not self.by_default:
            return ()
        return (BY_DEFAULT if done else TOO_FEW,)
