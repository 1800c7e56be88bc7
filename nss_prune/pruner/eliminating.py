"""Eliminations as evidence: of one or two passes over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nss_prune.allocation.effects import measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.core.outputs import OutputsSpec
from nss_prune.core.views import views_of
from nss_prune.pruner.meaning import outputs_for
from nss_prune.pruner.observation import example_data
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.consumers import ConsumerSums


@dataclass(frozen=True, kw_only=True)
class EliminationEvidence(Evidence):
    """Layer -> its neurons in the order of backward elimination, and what that causes."""

    eliminations: dict[str, Elimination]


@dataclass(frozen=True)
class Eliminating:
    """Eliminates the neurons of every group, in one pass; a second one measures what that costs.

    The second needs data that can be iterated again.

    Attributes:
        data: Batches of (inputs, labels); None for the example inputs.
        folds: Whether the removed neurons will be folded.
        outputs: What the outputs mean, see :data:`nss_prune.core.outputs.OutputsSpec`.
        progress: Show a progress bar; None for only on a terminal.
    """

    data: Iterable[Any] | None
    folds: bool
    outputs: OutputsSpec = None
    progress: bool | None = None

    def observe(self, subject: Subject) -> EliminationEvidence:
        """The evidence; the model is left as found.

        Raises:
            DataError, NumericalError: The data cannot be used.
            NothingToPruneError: No consumer sees samples.
        """
        subject = subject.readable()
        model, groups = subject.model, subject.groups
        given = self.data
        if given is None:
            given = example_data(subject, "what the outputs must not diverge on")
        outputs, data = outputs_for(subject, given, self.outputs)
        settings: dict[str, Any] = {"outputs": outputs, "progress": self.progress}
        settings.update(subject.calling)
        sums = ConsumerSums(model, groups, views_of(given)) if self.folds else None
        found = eliminations(model, data, groups, reads=sums, **settings)
        statistics = (
            None if sums is None else sums.surveyed(subject.example_inputs, **subject.calling)
        )
        if not isinstance(data, Iterator):
            found = measured(model, data, groups, found, statistics, **settings)
        return EliminationEvidence(
            neurons=subject.neurons,
            statistics=statistics,
            notes=(outputs.describe(), *outputs.notes),
            eliminations=found,
        )
