"""A finished profile as records of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nss_prune.core.text import described
from nss_prune.graph.neurons import NeuronMap
from nss_prune.profiling.profile import Profile
from nss_prune.profiling.similarity import Ranking
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import Records, Upkeep
from nss_prune.statistics.moments import ConsumerStatistics


@dataclass(frozen=True)
class Scored:
    """A layer by a metric.

    Attributes:
        contributions: ``[categories, neurons]``.
        overall: Over all data, ``[neurons]``.
        curves: Similarity after each rank, ``[categories, neurons]``.
    """

    metric: str
    layer: str
    contributions: Tensor
    overall: Tensor
    curves: Tensor


@dataclass(frozen=True)
class Counted:
    """What a profile says beside; as :class:`Profile` has it."""

    categories: tuple[Any, ...]
    samples: tuple[int, ...]
    interval: int
    notes: tuple[str, ...]
    ranked_by: Ranking
    used: int
    unused: int


KINDS = {"scores": Scored, "counts": Counted, "statistics": ConsumerStatistics}


def recalled(
    upkeep: Upkeep, subject: Subject, data: Iterable[Any], asked: Any, make: Callable[[], Profile]
) -> Profile:
    """The profile of a finished pass, from the checkpoint where it has it, made otherwise.

    Args:
        asked: What it depends on beside the model's neurons.
    """
    wanted = (subject.layers, described(asked))
    found = upkeep.recalled(
        "profile", subject.model, data, wanted, KINDS, lambda: records_of(make())
    )
    return profile_in(found, subject.neurons)


def records_of(profile: Profile) -> Records:
    """All but the neurons and the sums that are kept to be merged."""
    scored = [
        Scored(
            metric,
            layer,
            values,
            profile.overall[metric][layer],
            profile.curves[metric][layer],
        )
        for metric, layers in profile.contributions.items()
        for layer, values in layers.items()
    ]
    counted = Counted(
        profile.categories,
        profile.samples,
        profile.interval,
        profile.notes,
        profile.ranked_by,
        profile.used,
        profile.unused,
    )
    return {
        "scores": {str(position): found for position, found in enumerate(scored)},
        "counts": {"": counted},
        "statistics": dict(profile.consumers or {}),
    }


def profile_in(records: Records, neurons: NeuronMap) -> Profile:
    """The inverse of :func:`records_of`, with the neurons that were profiled."""
    scored: list[Scored] = list(records["scores"].values())
    counted: Counted = records["counts"][""]

    def by_metric(part: str) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for each in scored:
            found.setdefault(each.metric, {})[each.layer] = getattr(each, part)
        return found

    return Profile(
        neurons=neurons,
        categories=tuple(tuple(part) for part in counted.categories),
        samples=counted.samples,
        contributions=by_metric("contributions"),
        overall=by_metric("overall"),
        curves=by_metric("curves"),
        interval=counted.interval,
        notes=counted.notes,
        consumers=records["statistics"] or None,
        ranked_by=counted.ranked_by,
        used=counted.used,
        unused=counted.unused,
    )
