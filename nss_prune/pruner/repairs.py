"""The repairs of layers: folding, refitting, recalibration of norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from nss_prune.compensation.folding import Folded, apply, folding
from nss_prune.compensation.recalibration import (
    NormStatistics,
    kept_statistics,
    norm_statistics,
    recalibrate,
    running_norms,
)
from nss_prune.compensation.refit import refit
from nss_prune.compensation.verified import verified
from nss_prune.core.processes import processes
from nss_prune.graph.slices import Slice
from nss_prune.pruner.repair import Repaired
from nss_prune.pruner.schedule import FORWARD, Stage, kept_bytes
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import DEFAULT, Records, Upkeep
from nss_prune.statistics.consumers import ConsumerSums, consumer_statistics
from nss_prune.statistics.memory import parts_within
from nss_prune.statistics.moments import ConsumerStatistics


@dataclass(frozen=True)
class Fold:
    """Folds the neurons that go into their consumers, see :mod:`nss_prune.compensation.folding`.

    Attributes:
        before_removal: Nothing is left to do after the removal.
        data: Batches; None where there are none.
        upkeep: What the passes may take, keep and show.
    """

    before_removal: ClassVar = True
    data: Iterable[Any] | None
    upkeep: Upkeep = DEFAULT

    def observe(
        self, subject: Subject, evidence: Evidence
    ) -> Mapping[str, ConsumerStatistics] | None:
        """What the consumers see, from the strategy's own pass where there was one."""
        if evidence.statistics is not None or self.data is None:
            return evidence.statistics
        kinds, make = {"statistics": ConsumerStatistics}, partial(self._seen, subject, self.data)
        found = self.upkeep.recalled(
            "consumers", subject.model, self.data, subject.layers, kinds, make
        )
        return found["statistics"]

    def stages(self, subject: Subject, before: Sequence[Stage]) -> list[Stage]:
        """Passes of its own, where the strategy's have no room for what it needs."""
        sizes = list(ConsumerSums(subject.model, subject.groups).bytes.values())
        limit = self.upkeep.memory_limit
        shared = any(stage.name == "sensitivity" for stage in before)
        profiled = any(stage.name == "profile" for stage in before) and sum(sizes) <= limit
        if self.data is None or shared or profiled:
            return []
        passes = len(parts_within(sizes, int, limit))
        return [Stage("folding", passes, 2 * FORWARD, kept_bytes(sizes, limit))]

    def _seen(self, subject: Subject, data: Iterable[Any]) -> Records:
        found = consumer_statistics(
            subject.model,
            data,
            subject.groups,
            progress=self.upkeep.progress,
            memory_limit=self.upkeep.memory_limit,
            **subject.calling,
        )
        return {"statistics": found}

    def before(
        self, subject: Subject, chosen: Slice, seen: Mapping[str, ConsumerStatistics] | None
    ) -> Repaired:
        """Fold."""
        if seen is None:
            return Repaired(("nothing was folded: there is no data",))
        folds = folding(subject.model, chosen, seen)
        # What can be read only once is gone, and each process has a part of the data.
        if self.data is not None and not isinstance(self.data, Iterator) and processes() == 1:
            folds = verified(subject.model, chosen, folds, self.data, subject.forward)
        return _as_repaired(apply(subject.model, folds))

    def after(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Nothing more."""
        return Repaired()


@dataclass(frozen=True)
class Refit:
    """Fits consumer after consumer to the whole model, see :mod:`nss_prune.compensation.refit`.

    Attributes:
        data: Batches that can be iterated again.
        progress: Show a progress bar; None for only on a terminal.
    """

    before_removal: ClassVar = True
    data: Iterable[Any]
    progress: bool | None = None

    def observe(self, subject: Subject, evidence: Evidence) -> None:
        """Nothing: what the consumers see depends on those before them."""

    def stages(self, subject: Subject, before: Sequence[Stage]) -> list[Stage]:
        """A pass for every consumer, in which both models run up to it."""
        sizes = ConsumerSums(subject.model, subject.groups).bytes.values()
        return [Stage("refit", 1, 2 * FORWARD * len(sizes), 4 * max(sizes, default=0))]

    def before(self, subject: Subject, chosen: Slice, seen: None) -> Repaired:
        """Refit."""
        return _as_repaired(
            refit(subject.model, chosen, self.data, progress=self.progress, **subject.calling)
        )

    def after(self, subject: Subject, chosen: Slice, seen: None) -> Repaired:
        """Nothing more."""
        return Repaired()


def _as_repaired(folded: Folded) -> Repaired:
    return Repaired(folded.notes, tuple(folded.errors))


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
