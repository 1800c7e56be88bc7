"""Eliminations as evidence: of one or two passes over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from nss_prune.allocation.effects import effect_passes, measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.allocation.parts import GroupPart, parts_of
from nss_prune.core.outputs import OutputsSpec
from nss_prune.core.views import views_of
from nss_prune.pruner.meaning import outputs_for
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import BACKWARD, DEFAULT, Records, Stage, Upkeep
from nss_prune.statistics.consumers import ConsumerSums, in_files
from nss_prune.statistics.memory import BYTES, check_passes
from nss_prune.statistics.moments import ConsumerStatistics

KINDS = {"eliminations": Elimination, "statistics": ConsumerStatistics}


@dataclass(frozen=True, kw_only=True)
class EliminationEvidence(Evidence):
    """Layer -> its neurons in the order of backward elimination, and what that causes."""

    eliminations: dict[str, Elimination]


@dataclass(frozen=True)
class Eliminating:
    """Eliminates the neurons of every group, in one pass; a second one measures what that costs.

    The second needs data that can be iterated again.

    Attributes:
        data: Batches of (inputs, labels).
        folds: Whether the removed neurons will be folded.
        outputs: What the outputs mean, see :data:`nss_prune.core.outputs.OutputsSpec`.
        upkeep: What the passes may take, keep and show.
    """

    data: Iterable[Any]
    folds: bool
    outputs: OutputsSpec = None
    upkeep: Upkeep = DEFAULT

    def observe(self, subject: Subject) -> EliminationEvidence:
        """The evidence; the model is left as found.

        Raises:
            DataError, NumericalError: The data cannot be used.
            NothingToPruneError: No consumer sees samples.
        """
        subject = subject.readable()
        model = subject.model
        outputs, data = outputs_for(subject, self.data, self.outputs)
        settings: dict[str, Any] = {"outputs": outputs, "progress": self.upkeep.progress}
        settings.update(subject.calling)
        asked = (self.folds, subject.layers, outputs.describe())
        parts = self.parts(subject)
        check_passes(data, len(parts), self.upkeep.memory_limit)
        found: dict[str, Elimination] = {}
        statistics: dict[str, ConsumerStatistics] = {}
        for part in parts:
            of_part = (*asked, part.consumers)
            make = partial(self._eliminated, subject, data, part, settings)
            some = self.upkeep.recalled("sensitivities", model, data, of_part, KINDS, make)
            found.update(some["eliminations"])
            seen = some["statistics"]
            statistics.update(in_files(seen) if len(parts) > 1 else seen)
        known = statistics if self.folds else None
        if not isinstance(data, Iterator):
            make = partial(self._measured, subject, data, found, known, settings)
            found = self.upkeep.recalled("effects", model, data, asked, KINDS, make)["eliminations"]
        return EliminationEvidence(
            neurons=subject.neurons,
            statistics=known,
            notes=(outputs.describe(), *outputs.notes),
            eliminations=found,
        )

    def stages(self, subject: Subject) -> list[Stage]:
        """The passes: of the eliminations, and of what is measured of them."""
        parts = self.parts(subject)
        most = max(part.bytes for part in parts)
        found = [Stage("sensitivity", len(parts), 1.5 * BACKWARD, most)]
        if isinstance(self.data, Iterator):
            return found
        sizes = ConsumerSums(subject.model, subject.groups).bytes if self.folds else {}
        values = {name: size // BYTES for name, size in sizes.items()}
        passes, kept = effect_passes(subject.groups, values, self.upkeep.memory_limit)
        return [*found, Stage("effects", passes, 1.5 * BACKWARD, kept)]

    def parts(self, subject: Subject) -> list[GroupPart]:
        """What each pass of the first kind adds up."""
        consumers = ConsumerSums(subject.model, subject.groups).bytes if self.folds else {}
        return parts_of(subject.groups, consumers, self.upkeep.memory_limit)

    def _eliminated(
        self, subject: Subject, data: Iterable[Any], part: GroupPart, settings: dict[str, Any]
    ) -> Records:
        """The eliminations of one pass, and what the consumers read."""
        model, views = subject.model, views_of(self.data)
        sums = ConsumerSums(model, subject.groups, views, part.consumers) if self.folds else None
        found = eliminations(model, data, part.groups, reads=sums, **settings)
        seen = {} if sums is None else sums.surveyed(subject.example_inputs, **subject.calling)
        return {"eliminations": found, "statistics": seen}

    def _measured(
        self,
        subject: Subject,
        data: Iterable[Any],
        found: dict[str, Elimination],
        statistics: dict[str, ConsumerStatistics] | None,
        settings: dict[str, Any],
    ) -> Records:
        """The eliminations with the divergence measured."""
        limit = self.upkeep.memory_limit
        found = measured(
            subject.model, data, subject.groups, found, statistics, memory_limit=limit, **settings
        )
        return {"eliminations": found}
