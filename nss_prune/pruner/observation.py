"""The passes over the data: a profile, or eliminations."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nss_prune.allocation.effects import measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.allocation.importance import NSSImportance
from nss_prune.core.processes import processes
from nss_prune.core.views import views_of
from nss_prune.errors import ModelMismatchError
from nss_prune.profiling.profile import Profile
from nss_prune.profiling.run import profile_neurons
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.consumers import ConsumerSums


@dataclass(frozen=True, kw_only=True)
class ProfileEvidence(Evidence):
    """A profile of the subject's neurons."""

    profile: Profile

    @cached_property
    def importance(self) -> NSSImportance:
        """The semantic importance of every neuron."""
        return NSSImportance(self.profile)


@dataclass(frozen=True, kw_only=True)
class EliminationEvidence(Evidence):
    """Layer -> its neurons in the order of backward elimination, and what that causes."""

    eliminations: dict[str, Elimination]


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
        neurons=neurons, statistics=profile.readers, notes=profile.notes, profile=profile
    )


@dataclass(frozen=True)
class Profiling:
    """Profiles a subject.

    Attributes:
        data: Batches of (inputs, labels); None for the example inputs.
        keeps_statistics: Whether to add up what folding needs in the same pass.
        settings: Of :func:`nss_prune.profiling.run.profile_neurons`.
    """

    data: Iterable[Any] | None
    keeps_statistics: bool
    settings: dict[str, Any]

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
            keeps = self.keeps_statistics and processes() == 1
            profile = self._of(subject, self.data, keep_readers=keeps, minimum_samples=2)
        return evidence_of(profile, subject)

    def _of_example_inputs(self, subject: Subject) -> Profile:
        inputs = subject.example_inputs
        if isinstance(inputs, (tuple, list)) and len(inputs) == 1:
            inputs = inputs[0]
        own = {"categories": "predicted"} if self.settings["categories"] == "labels" else {}
        profile = self._of(subject, [(inputs, None)], minimum_samples=1, **own)
        warnings.warn(
            f"no data was given: the example inputs ({sum(profile.samples)} sample(s)) are "
            "profiled, with the model's predictions as categories; pass data=, batches of "
            "(inputs, labels), for slices that hold on other inputs",
            stacklevel=2,
        )
        return profile

    def _of(self, subject: Subject, data: Iterable[Any], **own: Any) -> Profile:
        settings = {**self.settings, **subject.calling, **own}
        return profile_neurons(
            subject.model, data, subject.neurons, subject.example_inputs, **settings
        )


@dataclass(frozen=True)
class Eliminating:
    """Eliminates the neurons of every group, in one pass; a second one measures what that costs.

    The second needs data that can be iterated again.

    Attributes:
        data: Batches of (inputs, labels).
        folds: Whether the removed neurons will be folded.
        settings: Keywords of :func:`nss_prune.allocation.elimination.eliminations` and
            :func:`nss_prune.allocation.effects.measured`.
    """

    data: Iterable[Any]
    folds: bool
    settings: dict[str, Any]

    def observe(self, subject: Subject) -> EliminationEvidence:
        """The evidence; the model is left as found.

        Raises:
            DataError, NumericalError: The data cannot be used.
            NothingToPruneError: No consumer sees samples.
        """
        subject = subject.readable()
        model, groups = subject.model, subject.groups
        settings = {**self.settings, **subject.calling}
        sums = ConsumerSums(model, groups, views_of(self.data)) if self.folds else None
        found = eliminations(model, self.data, groups, reads=sums, **settings)
        statistics = None if sums is None else sums.surveyed(subject.example_inputs)
        if not isinstance(self.data, Iterator):
            found = measured(model, self.data, groups, found, statistics, **settings)
        return EliminationEvidence(
            neurons=subject.neurons, statistics=statistics, eliminations=found
        )
