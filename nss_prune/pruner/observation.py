"""A profile as evidence: of a pass over the data, or made before."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nss_prune.allocation.importance import NSSImportance
from nss_prune.core.nested import tensors_in
from nss_prune.errors import ModelMismatchError
from nss_prune.profiling.categories import Categories, check_categories
from nss_prune.profiling.contributions.protocol import metric_named
from nss_prune.profiling.profile import Profile
from nss_prune.profiling.run import profile_neurons
from nss_prune.profiling.similarity import Features, Landscape
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import BACKWARD, DEFAULT, Stage, Upkeep
from nss_prune.statistics.consumers import ConsumerSums
from nss_prune.statistics.memory import group_bytes


@dataclass(frozen=True, kw_only=True)
class ProfileEvidence(Evidence):
    """A profile of the subject's neurons."""

    profile: Profile

    @cached_property
    def importance(self) -> NSSImportance:
        """The semantic importance of every neuron."""
        return NSSImportance(self.profile)


def evidence_of(profile: Profile, subject: Subject) -> ProfileEvidence:
    """What a profile that was made before says of a subject.

    Raises:
        ModelMismatchError: It is of another model.
    """
    neurons = subject.neurons.without(profile.neurons.left_alone)
    sizes = {group.name: group.size for group in neurons.groups}
    if any(profile.layers.get(name) != size for name, size in sizes.items()):
        raise ModelMismatchError(
            f"the profile has the layers {profile.layers}, the model {sizes}; profile this "
            "model as it is, with the same ignored_layers"
        )
    return ProfileEvidence(
        neurons=neurons, statistics=profile.consumers, notes=profile.notes, profile=profile
    )


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
            keeps = self.keeps_consumers(subject)
            profile = self._of(subject, self.data, keep_readers=keeps, minimum_samples=2)
        return evidence_of(profile, subject)

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


def example_data(subject: Subject, use: str) -> list[Any]:
    """The example inputs as data of one batch without labels, with a warning.

    Args:
        use: What happens to them.
    """
    inputs = subject.example_inputs
    if isinstance(inputs, (tuple, list)) and len(inputs) == 1:
        inputs = inputs[0]
    warnings.warn(
        f"no data was given: the example inputs ({len(tensors_in(inputs)[0])} sample(s)) are "
        f"{use}; pass data=, batches of (inputs, labels), for slices that hold on other inputs",
        stacklevel=2,
    )
    return [(inputs, None)]


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
