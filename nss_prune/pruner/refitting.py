"""The repair that fits consumer after consumer to the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nss_prune.compensation.refit import refit
from nss_prune.graph.slices import Slice
from nss_prune.pruner.repair import Repaired
from nss_prune.pruner.schedule import FORWARD, Stage
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.consumers import ConsumerSums


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
        done = refit(subject.model, chosen, self.data, progress=self.progress, **subject.calling)
        return Repaired(done.notes, tuple(done.errors))

    def after(self, subject: Subject, chosen: Slice, seen: None) -> Repaired:
        """Nothing more."""
        return Repaired()
