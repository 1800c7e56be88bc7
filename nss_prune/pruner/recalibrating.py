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
from nss_prune.graph.slices import Slice
from nss_prune.pruner.repair import Repaired
from nss_prune.pruner.schedule import FORWARD, Stage
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import DEFAULT, Records, Upkeep


@dataclass(frozen=True)
class Recalibrate:
    """Moves the running statistics of BatchNorms as far as those of the data moved.

    See :mod:`nss_prune.compensation.recalibration`.

    Attributes:
        data: Batches that can be iterated again.
        upkeep: What the passes may take, keep and show.
    """

    data: Iterable[Any]
    upkeep: Upkeep = DEFAULT

    def observe(self, subject: Subject, evidence: Evidence) -> dict[str, NormStatistics]:
        """What the BatchNorms see in the whole model."""
        kinds, asked = {"norms": NormStatistics}, subject.layers
        make = partial(self._seen, subject)
        return self.upkeep.recalled("norms", subject.model, self.data, asked, kinds, make)["norms"]

    def stages(self, subject: Subject, before: Sequence[Stage]) -> list[Stage]:
        """A pass before the removal, and one after it."""
        norms = len(running_norms(subject.model))
        return [Stage("recalibration", 2, FORWARD)] if norms else []

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
        if running_norms(subject.model):
            return Repaired()
        return Repaired(("nothing was recalibrated: the model has no BatchNorm",))
