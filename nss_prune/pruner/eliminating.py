"""Eliminations as evidence: of one or two passes over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from nss_prune.allocation.effects import LEAST_SAMPLES, effect_passes, measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.allocation.head_bases import head_bases, last_first
from nss_prune.allocation.interactions import Interactions, Predictor, Products
from nss_prune.allocation.parts import GroupPart, parts_of
from nss_prune.core.batches import has_samples
from nss_prune.core.outputs import Outputs, OutputsSpec
from nss_prune.core.processes import processes
from nss_prune.core.views import views_of
from nss_prune.graph.bases import BasisChange, in_basis
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.pruner.meaning import outputs_for
from nss_prune.pruner.observation import example_data
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import BACKWARD, DEFAULT, Records, Stage, Upkeep
from nss_prune.statistics.consumers import ConsumerSums, in_files
from nss_prune.statistics.memory import BYTES, check_passes
from nss_prune.statistics.moments import ConsumerStatistics

KINDS = {
    "eliminations": Elimination,
    "statistics": ConsumerStatistics,
    "interactions": Products,
}


@dataclass(frozen=True, kw_only=True)
class EliminationEvidence(Evidence):
    """Layer -> its neurons in the order of backward elimination, and what that causes.

    Attributes:
        interactions: What the layers do to the outputs together; without parts where nothing was
            measured.
    """

    eliminations: dict[str, Elimination]
    interactions: Interactions = field(default_factory=Interactions)

    @cached_property
    def predictor(self) -> Predictor:
        """The predicted divergence of any slice."""
        return Predictor(self.eliminations, self.interactions)


@dataclass(frozen=True)
class Eliminating:
    """Eliminates the neurons of every group, in one pass; a second one measures what that costs.

    The second needs data that can be iterated again.

    Attributes:
        data: Batches of (inputs, labels); None for the example inputs.
        folds: Whether the removed neurons will be folded.
        outputs: What the outputs mean, see :data:`nss_prune.core.outputs.OutputsSpec`.
        upkeep: What the passes may take, keep and show.
        inside_heads: Whether dimensions inside heads may go, where their effects are measured in
            one process.
    """

    data: Iterable[Any] | None
    folds: bool
    outputs: OutputsSpec = None
    upkeep: Upkeep = DEFAULT
    inside_heads: bool = True

    def observe(self, subject: Subject) -> EliminationEvidence:
        """The evidence; the model is left as found.

        Raises:
            DataError, NumericalError: The data cannot be used.
            NothingToPruneError: No consumer sees samples.
        """
        subject = subject.readable()
        model, given = subject.model, self.data
        if given is None:
            given = example_data(subject, "what the outputs must not diverge on")
        outputs, data = outputs_for(subject, given, self.outputs)
        settings: dict[str, Any] = {"outputs": outputs, "progress": self.upkeep.progress}
        settings.update(subject.calling)
        bases: dict[str, tuple[BasisChange, ...]] = {}
        if self._goes_inside_heads(data):
            subject = subject.with_head_dimensions()
            inside = [group.name for group in subject.groups if group.is_inside_heads]
            bases = head_bases(model, data, inside, **settings) if inside else {}
        with in_basis(model, [change for changes in bases.values() for change in changes]):
            return self._observed(subject, outputs, data, bases, settings)

    def _goes_inside_heads(self, data: Iterable[Any]) -> bool:
        again = not isinstance(data, Iterator) and processes() == 1
        return self.inside_heads and again and has_samples(data, LEAST_SAMPLES)

    def _observed(
        self,
        subject: Subject,
        outputs: Outputs,
        data: Iterable[Any],
        bases: Mapping[str, tuple[BasisChange, ...]],
        settings: dict[str, Any],
    ) -> EliminationEvidence:
        """The evidence on a model whose heads have their new coordinates."""
        model, upkeep = subject.model, self.upkeep
        asked = (self.folds, subject.layers, outputs.describe())
        parts = self.parts(subject)
        check_passes(data, len(parts), upkeep.memory_limit)
        found: dict[str, Elimination] = {}
        statistics: dict[str, ConsumerStatistics] = {}
        for part in parts:
            of_part = (*asked, part.consumers)
            make = partial(self._eliminated, subject, data, part, settings)
            some = upkeep.recalled("sensitivities", model, data, of_part, KINDS, make)
            found.update(some["eliminations"])
            seen = some["statistics"]
            statistics.update(in_files(seen) if len(parts) > 1 else seen)
        found |= {
            group.name: last_first(group) for group in subject.groups if group.is_inside_heads
        }
        known, together = statistics if self.folds else None, Interactions()
        if not isinstance(data, Iterator):
            make = partial(self._measured, subject, data, found, known, settings)
            some = upkeep.recalled("effects", model, data, asked, KINDS, make)
            found, together = some["eliminations"], Interactions.of(some["interactions"])
        return EliminationEvidence(
            neurons=subject.neurons,
            statistics=known,
            notes=(outputs.describe(), *outputs.notes),
            eliminations=found,
            bases=bases,
            interactions=together,
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
        return parts_of(_channels(subject), consumers, self.upkeep.memory_limit)

    def _eliminated(
        self, subject: Subject, data: Iterable[Any], part: GroupPart, settings: dict[str, Any]
    ) -> Records:
        """The eliminations of one pass, and what the consumers read."""
        model, views = subject.model, views_of(data)
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
        together = Interactions()
        found = measured(
            subject.model,
            data,
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
