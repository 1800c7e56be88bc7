"""The repair that folds what is removed into its consumers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from nss_prune.compensation.folding import apply, folding
from nss_prune.compensation.verified import verified
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
        """A pass that verifies the folds, after those of its own that :meth:`_observing` takes."""
        if self.data is None or isinstance(self.data, Iterator):
            return self._observing(subject, before)
        # The whole model, the sliced one and the folded one.
        return [*self._observing(subject, before), Stage("verification", 1, 3 * FORWARD)]

    def _observing(self, subject: Subject, before: Sequence[Stage]) -> list[Stage]:
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
            subject.readable().groups,  # with the axis of the samples of each consumer
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
        if self.data is not None and not isinstance(self.data, Iterator):
            progress = self.upkeep.progress
            folds = verified(subject.model, chosen, folds, self.data, subject.forward, progress)
        done = apply(subject.model, folds)
        return Repaired(done.notes, tuple(done.errors))

    def after(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Nothing more."""
        return Repaired()
