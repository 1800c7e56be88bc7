"""The passes over the data that eliminations take, in as many parts as the memory asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nss_prune.allocation.effects import effect_passes, measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.allocation.head_bases import last_first
from nss_prune.allocation.interactions import Interactions, Products
from nss_prune.allocation.parts import GroupPart, parts_of
from nss_prune.core.views import views_of
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import BACKWARD, Records, Stage, Upkeep
from nss_prune.statistics.consumers import ConsumerSums
from nss_prune.statistics.memory import BYTES, check_passes
from nss_prune.statistics.moments import ConsumerStatistics

KINDS = {
    "eliminations": Elimination,
    "statistics": ConsumerStatistics,
    "interactions": Products,
}


@dataclass(frozen=True)
class Passes:
    """Eliminates the neurons of every group, and measures what that causes.

    Attributes:
        data: Batches of (inputs, labels); None where the passes are only counted.
        folds: Whether the removed neurons will be folded.
        upkeep: What the passes may take, keep and show.
    """

    data: Iterable[Any] | None
    folds: bool
    upkeep: Upkeep

    def run(
        self, subject: Subject, meaning: str, settings: Mapping[str, Any]
    ) -> tuple[dict[str, Elimination], dict[str, ConsumerStatistics] | None, Interactions]:
        """The eliminations, the statistics to fold with, and what layers do together.

        Args:
            meaning: Of the outputs, in words; sums for another one are not taken.
            settings: Further keywords of the passes.
        """
        model, data, upkeep = subject.model, self._given, self.upkeep
        asked = (self.folds, subject.layers, meaning)
        parts = self._parts(subject)
        check_passes(data, len(parts), upkeep.memory_limit)
        found: dict[str, Elimination] = {}
        statistics: dict[str, ConsumerStatistics] = {}
        for part in parts:
            of_part = (*asked, part.consumers)
            make = partial(self._eliminated, subject, part, settings, len(parts) > 1)
            some = upkeep.recalled("sensitivities", model, data, of_part, KINDS, make)
            found.update(some["eliminations"])
            statistics.update(some["statistics"])
        found |= {
            group.name: last_first(group) for group in subject.groups if group.is_inside_heads
        }
        known, together = statistics if self.folds else None, Interactions()
        if not isinstance(data, Iterator):
            make = partial(self._measured, subject, found, known, settings)
            some = upkeep.recalled("effects", model, data, asked, KINDS, make)
            found, together = some["eliminations"], Interactions.of(some["interactions"])
        return found, known, together

    @property
    def _given(self) -> Iterable[Any]:
        assert self.data is not None
        return self.data

    def stages(self, subject: Subject) -> list[Stage]:
        """The passes: of the eliminations, and of what is measured of them."""
        parts = self._parts(subject)
        most = max(part.bytes for part in parts)
        found = [Stage("sensitivity", len(parts), 1.5 * BACKWARD, most)]
        if isinstance(self.data, Iterator):
            return found
        sizes = ConsumerSums(subject.model, subject.groups).bytes if self.folds else {}
        values = {name: size // BYTES for name, size in sizes.items()}
        passes, kept = effect_passes(subject.groups, values, self.upkeep.memory_limit)
        return [*found, Stage("effects", passes, 1.5 * BACKWARD, kept)]

    def _parts(self, subject: Subject) -> list[GroupPart]:
        """What each pass of the first kind adds up."""
        consumers = ConsumerSums(subject.model, subject.groups).bytes if self.folds else {}
        return parts_of(_channels(subject), consumers, self.upkeep.memory_limit)

    def _eliminated(
        self, subject: Subject, part: GroupPart, settings: Mapping[str, Any], in_files: bool
    ) -> Records:
        """The eliminations of one pass, and what the consumers read, in files or in memory."""
        model, data = subject.model, self._given
        views = views_of(data)
        sums = ConsumerSums(model, subject.groups, views, part.consumers) if self.folds else None
        found = eliminations(model, data, part.groups, reads=sums, **settings)
        if sums is None:
            return {"eliminations": found, "statistics": {}}
        calling = {**subject.calling, "in_files": in_files}
        seen = sums.surveyed(subject.example_inputs, **calling)
        return {"eliminations": found, "statistics": seen}

    def _measured(
        self,
        subject: Subject,
        found: dict[str, Elimination],
        statistics: dict[str, ConsumerStatistics] | None,
        settings: Mapping[str, Any],
    ) -> Records:
        """The eliminations with the divergence measured."""
        together = Interactions()
        found = measured(
            subject.model,
            self._given,
            subject.groups,
            found,
            statistics,
            memory_limit=self.upkeep.memory_limit,
            interactions=together,
            **settings,
        )
        return {"eliminations": found, "interactions": together.records()}


def _channels(subject: Subject) -> tuple[NeuronGroup, ...]:
    """The groups whose neurons are no dimensions inside heads."""
    return tuple(group for group in subject.groups if not group.is_inside_heads)
