"""Eliminations as evidence: of one or two passes over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from nss_prune.allocation.effects import LEAST_SAMPLES, measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.allocation.head_bases import head_bases, last_first
from nss_prune.allocation.interactions import Interactions, Predictor
from nss_prune.core.batches import has_samples
from nss_prune.core.outputs import Outputs, OutputsSpec
from nss_prune.core.views import views_of
from nss_prune.graph.bases import BasisChange, in_basis
from nss_prune.pruner.meaning import outputs_for
from nss_prune.pruner.observation import example_data
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.consumers import ConsumerSums


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
        progress: Show a progress bar; None for only on a terminal.
        inside_heads: Whether dimensions inside heads may go, where their effects are measured.
    """

    data: Iterable[Any] | None
    folds: bool
    outputs: OutputsSpec = None
    progress: bool | None = None
    inside_heads: bool = True

    def observe(self, subject: Subject) -> EliminationEvidence:
        """The evidence; the model is left as found.

        Raises:
            DataError, NumericalError: The data cannot be used.
            NothingToPruneError: No consumer sees samples.
        """
        subject = subject.readable()
        model = subject.model
        given = self.data
        if given is None:
            given = example_data(subject, "what the outputs must not diverge on")
        outputs, data = outputs_for(subject, given, self.outputs)
        settings: dict[str, Any] = {"outputs": outputs, "progress": self.progress}
        settings.update(subject.calling)
        bases: dict[str, tuple[BasisChange, ...]] = {}
        if (
            self.inside_heads
            and not isinstance(data, Iterator)
            and has_samples(data, LEAST_SAMPLES)
        ):
            subject = subject.with_head_dimensions()
            inside = [group.name for group in subject.groups if group.is_inside_heads]
            bases = head_bases(model, data, inside, **settings) if inside else {}
        with in_basis(model, [change for changes in bases.values() for change in changes]):
            return self._observed(subject, outputs, data, bases, settings)

    def _observed(
        self,
        subject: Subject,
        outputs: Outputs,
        data: Iterable[Any],
        bases: Mapping[str, tuple[BasisChange, ...]],
        settings: Mapping[str, Any],
    ) -> EliminationEvidence:
        """The evidence on a model whose heads have their new coordinates."""
        model, groups = subject.model, subject.groups
        sums = ConsumerSums(model, groups, views_of(data)) if self.folds else None
        single = [group for group in groups if not group.is_inside_heads]
        found = eliminations(model, data, single, reads=sums, **settings)
        found |= {group.name: last_first(group) for group in groups if group.is_inside_heads}
        statistics = (
            None if sums is None else sums.surveyed(subject.example_inputs, **subject.calling)
        )
        together = Interactions()
        if not isinstance(data, Iterator):
            found = measured(
                model, data, groups, found, statistics, interactions=together, **settings
            )
        return EliminationEvidence(
            neurons=subject.neurons,
            statistics=statistics,
            notes=(outputs.describe(), *outputs.notes),
            eliminations=found,
            bases=bases,
            interactions=together,
        )
