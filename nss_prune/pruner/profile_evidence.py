"""A profile as evidence: of a pass over the data, or made before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from nss_prune.allocation.importance import NSSImportance
from nss_prune.errors import ModelMismatchError
from nss_prune.profiling.profile import Profile
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject


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
