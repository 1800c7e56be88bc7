"""The pass over the data that makes a profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nss_prune.profiling.categories import check_categories
from nss_prune.profiling.contributions.protocol import metric_named
from nss_prune.profiling.run import profile_neurons
from nss_prune.profiling.similarity import Landscape
from nss_prune.pruner.example_data import example_data
from nss_prune.pruner.kept_profile import recalled
from nss_prune.pruner.profile_evidence import ProfileEvidence, evidence_of
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.types import Categories, Features, Profile
from nss_prune.pruner.upkeep import BACKWARD, DEFAULT, Stage, Upkeep
from nss_prune.statistics.consumers import ConsumerSums
from nss_prune.statistics.memory import group_bytes


@dataclass(frozen=True)
class Profiling:
    """Profiles a subject.

    Attributes:
        data: Batches of (inputs, labels); None for the example inputs.
        keeps_statistics: Whether to add up what folding needs in the same pass.
        settings: Of :func:`nss_prune.profiling.run.profile_neurons`.
        upkeep: What the pass may take, keep and show.
    """

    data: Iterable[Any] | None
    keeps_statistics: bool
    settings: dict[str, Any]
    upkeep: Upkeep = DEFAULT

    def observe(self, subject: Subject) -> ProfileEvidence:
        """The evidence, from one pass; the model is left as found.

        Raises:
            DataError, NumericalError: The data cannot be used.
            NothingToPruneError: No consumer sees samples.
        """
        subject = subject.readable()
        if self.data is None:
            profile = self._of_example_inputs(subject)
        else:
            profile = self._recalled(subject, self.data)
        return evidence_of(profile, subject)

    def _recalled(self, subject: Subject, data: Iterable[Any]) -> Profile:
        """The profile of a finished pass, from the checkpoint where it has it."""
        keeps = self.keeps_consumers(subject)
        make = partial(self._of, subject, data, keep_readers=keeps, minimum_samples=2)
        return recalled(self.upkeep, subject, data, (keeps, self.settings), make)

    def keeps_consumers(self, subject: Subject) -> bool:
        """Whether the pass sums up what the consumers read; else the fold takes its own."""
        sizes = ConsumerSums(subject.model, subject.groups).bytes
        return self.keeps_statistics and sum(sizes.values()) <= self.upkeep.memory_limit

    def stages(self, subject: Subject) -> list[Stage]:
        """The pass, more of them where the categories take more than the limit."""
        sums = sum(group_bytes(group) for group in subject.groups)
        return [Stage("profile", 1, BACKWARD, sums)]

    def _of_example_inputs(self, subject: Subject) -> Profile:
        own = {"categories": "predicted"} if self.settings["categories"] == "labels" else {}
        data = example_data(subject, "profiled, with the model's predictions as categories")
        return self._of(subject, data, minimum_samples=1, **own)

    def _of(self, subject: Subject, data: Iterable[Any], **own: Any) -> Profile:
        upkeep = {"progress": self.upkeep.progress, "memory_limit": int(self.upkeep.memory_limit)}
        settings = {**self.settings, **subject.calling, **upkeep, **own}
        return profile_neurons(
            subject.model, data, subject.neurons, subject.example_inputs, **settings
        )


def profiling_for(
    data: Iterable[Any] | None,
    fold: bool | str,
    metric: Any,
    categories: Categories,
    features: Features,
    ranking: str,
    settings: Mapping[str, Any],
    upkeep: Upkeep,
) -> Profiling:
    """How the model is profiled.

    Args:
        settings: Further keywords of :func:`nss_prune.profiling.run.profile_neurons`; None is
            left out.

    Raises:
        ArgumentError: A metric or categories that there are not.
    """
    check_categories(categories)
    own = {
        "metrics": (metric_named(metric),),
        "categories": categories,
        "landscape": Landscape(features),
        **_given(settings),
    }
    if ranking != "magnitude":
        own["ranking"] = ranking
    return Profiling(data, bool(fold) and data is not None, own, upkeep)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
