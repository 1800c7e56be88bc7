"""Eliminations as evidence: of one or two passes over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nss_prune.allocation.effects import LEAST_SAMPLES
from nss_prune.allocation.head_bases import head_bases
from nss_prune.core.batches import has_samples
from nss_prune.core.outputs import OutputsSpec
from nss_prune.graph.bases import BasisChange, in_basis
from nss_prune.pruner.elimination_evidence import EliminationEvidence
from nss_prune.pruner.elimination_passes import Passes
from nss_prune.pruner.example_data import example_data
from nss_prune.pruner.meaning import outputs_for
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import DEFAULT, Stage, Upkeep


@dataclass(frozen=True)
class Eliminating:
    """Eliminates the neurons of every group, in one pass; a second one measures what that costs.

    The second needs data that can be iterated again.

    Attributes:
        data: Batches of (inputs, labels); None for the example inputs.
        folds: Whether the removed neurons will be folded.
        outputs: What the outputs mean, see :data:`nss_prune.core.outputs.OutputsSpec`.
        upkeep: What the passes may take, keep and show.
        inside_heads: Whether dimensions inside heads may go, where their effects can be measured.
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
        if self.inside_heads and _measures(data):
            subject = subject.with_head_dimensions()
            inside = [group.name for group in subject.groups if group.is_inside_heads]
            bases = head_bases(model, data, inside, **settings) if inside else {}
        passes = Passes(data, self.folds, self.upkeep)
        with in_basis(model, [change for changes in bases.values() for change in changes]):
            found, statistics, together = passes.run(subject, outputs.describe(), settings)
        return EliminationEvidence(
            neurons=subject.neurons,
            statistics=statistics,
            notes=(outputs.describe(), *outputs.notes),
            eliminations=found,
            bases=bases,
            interactions=together,
        )

    def stages(self, subject: Subject) -> list[Stage]:
        """The passes: of the eliminations, and of what is measured of them."""
        return Passes(self.data, self.folds, self.upkeep).stages(subject)


@dataclass(frozen=True)
class ByElimination:
    """A strategy that selects by eliminations; derive from it and add ``select``.

    Attributes:
        eliminating: Observes.
    """

    eliminating: Eliminating

    def observe(self, subject: Subject) -> EliminationEvidence:
        """The eliminations, from one or two passes over the data."""
        return self.eliminating.observe(subject)

    def stages(self, subject: Subject) -> list[Stage]:
        """The passes of the eliminations."""
        return self.eliminating.stages(subject)


def _measures(data: Iterable[Any]) -> bool:
    """Whether what dimensions inside heads cause can be measured."""
    return not isinstance(data, Iterator) and has_samples(data, LEAST_SAMPLES)
