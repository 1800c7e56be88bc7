"""The repairs of layers: folding, refitting, recalibration of norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.consumers import consumer_statistics
from nss_prune.statistics.moments import ConsumerStatistics


@dataclass(frozen=True)
class Fold:
    """Folds the neurons that go into their consumers, see :mod:`nss_prune.compensation.folding`.

    Attributes:
        data: Batches; None where there are none.
        progress: Show a progress bar; None for only on a terminal.
    """

    data: Iterable[Any] | None
    progress: bool | None = None

    def observe(
        self, subject: Subject, evidence: Evidence
    ) -> Mapping[str, ConsumerStatistics] | None:
        """What the consumers see, from the strategy's own pass where there was one."""
        if evidence.statistics is not None or self.data is None or processes() > 1:
            return evidence.statistics
        return consumer_statistics(
            subject.model, self.data, subject.groups, progress=self.progress, **subject.calling
        )

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

    data: Iterable[Any]
    progress: bool | None = None

    def observe(self, subject: Subject, evidence: Evidence) -> None:
        """Nothing: what the consumers see depends on those before them."""

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
        progress: Show a progress bar; None for only on a terminal.
    """

    data: Iterable[Any]
    progress: bool | None = None

    def observe(self, subject: Subject, evidence: Evidence) -> dict[str, NormStatistics]:
        """What the BatchNorms see in the whole model."""
        return norm_statistics(subject.model, self.data, progress=self.progress, **subject.calling)

    def before(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Nothing yet."""
        return Repaired()

    def after(self, subject: Subject, chosen: Slice, seen: dict[str, NormStatistics]) -> Repaired:
        """Recalibrate, where there is a norm."""
        if seen:
            kept = kept_statistics(seen, chosen)
            recalibrate(
                subject.model, self.data, whole=kept, progress=self.progress, **subject.calling
            )
        if running_norms(subject.model):
            return Repaired()
        return Repaired(("nothing was recalibrated: the model has no BatchNorm",))
