"""Profile: contributions and similarity curves of every neuron."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nss_prune.core.text import elided, listing, shortened
from nss_prune.errors import ArgumentError, ModelMismatchError
from nss_prune.graph.encoding import decode_groups, encode_groups
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.profiling.kept import (
    Statistics,
    decode_statistics,
    encode_statistics,
    total_statistics,
)
from nss_prune.profiling.schema import VALUES, read_profile, write_profile
from nss_prune.profiling.scores import Scores
from nss_prune.profiling.selection import Strategy, slice_profile
from nss_prune.profiling.similarity import Ranking, check_interval, entry_thresholds, ranked
from nss_prune.profiling.streaming import Part
from nss_prune.statistics.moments import ConsumerStatistics


@dataclass(frozen=True)
class Profile:
    """What the data says about every neuron.

    Attributes:
        neurons: The groups the names below refer to.
        categories: The categories compared, each the labels that count as one; -1 stands for
            samples without a label.
        samples: Samples in each category; one with several labels is in several.
        contributions: metric -> layer -> ``[categories, neurons]``.
        overall: metric -> layer -> contributions over all data, ``[neurons]``.
        curves: metric -> layer -> ``[categories, neurons]``, the similarity after each rank.
        interval: Neurons that Algorithm 1 adds at a time.
        notes: What a user should know.
        statistics: The sums, where ``profile(..., keep_statistics=True)`` kept them.
        consumers: What every consumer reads, where ``profile(..., keep_readers=True)`` kept it:
            what folding needs. It is not saved.
        ranked_by: "magnitude" or "signed", see :func:`nss_prune.profiling.similarity.ranked`.
        used: Number of samples that count for a category, each counted once.
        unused: Number of samples that count for none.
    """

    neurons: NeuronMap
    categories: tuple[Part, ...]
    samples: tuple[int, ...]
    contributions: dict[str, dict[str, Tensor]]
    overall: dict[str, dict[str, Tensor]]
    curves: dict[str, dict[str, Tensor]]
    interval: int = 1
    notes: tuple[str, ...] = ()
    statistics: Statistics | None = field(default=None, repr=False)
    consumers: dict[str, ConsumerStatistics] | None = field(default=None, repr=False)
    ranked_by: Ranking = "magnitude"
    used: int = 0
    unused: int = 0

    def __repr__(self) -> str:
        layers = [(shortened(name, 40), f"{size} neurons") for name, size in self.layers.items()]
        categories = ["+".join(elided([*map(str, part)], 3)) for part in self.categories]
        lines = [
            f"Profile of {sum(self.layers.values())} neurons in {len(layers)} layers",
            *listing(layers, 6, "more layers"),
            f"  metrics {', '.join(elided(self.metrics, 6))}, ranked by {self.ranked_by}",
            f"  samples {self.used} used, {self.unused} not used",
            f"  categories {', '.join(elided(categories, 8))}",
            *elided([f"  note: {shortened(note, 80)}" for note in self.notes], 3, "more notes"),
        ]
        return "\n".join(lines)

    @property
    def readers(self) -> dict[str, ConsumerStatistics] | None:
        """``consumers``, by its earlier name."""
        return self.consumers

    @property
    def groups(self) -> tuple[NeuronGroup, ...]:
        """The neuron groups, in the order of the model's modules."""
        return self.neurons.groups

    @property
    def layers(self) -> dict[str, int]:
        """Layer -> number of neurons."""
        return {group.name: group.size for group in self.groups}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics profiled; the first is the default of everything below."""
        return tuple(self.contributions)

    @property
    def thresholds(self) -> dict[str, dict[str, Tensor]]:
        """metric -> layer -> entry thresholds ``[categories, neurons]``, in [0, 1].

        Category c needs neuron n for θ iff ``thresholds[metric][layer][c, n] < θ``.
        """
        return {metric: self.entry_thresholds(metric) for metric in self.metrics}

    def entry_thresholds(self, metric: str, interval: int | None = None) -> dict[str, Tensor]:
        """Layer -> entry thresholds ``[categories, neurons]`` for any interval."""
        interval = self.interval if interval is None else check_interval(interval)
        return {
            name: entry_thresholds(curve, self.ranking(metric, name), interval)
            for name, curve in self.curves[metric].items()
        }

    def ranking(self, metric: str, layer: str) -> Tensor:
        """Neurons by contribution, see :func:`ranked`, ``[categories, neurons]``."""
        return ranked(self.contributions[metric][layer], self.ranked_by)

    def metric_or_default(self, metric: str | None) -> str:
        """``metric``, or the first one profiled.

        Raises:
            ArgumentError: It was not profiled.
        """
        if metric is None:
            return self.metrics[0]
        if metric not in self.contributions:
            raise ArgumentError(
                f"metric {metric!r} was not profiled; use one of {list(self.metrics)}, or "
                f"profile(..., metrics=({metric!r},))"
            )
        return metric

    def slice(
        self,
        theta: float | None = None,
        *,
        ratio: float | None = None,
        metric: str | None = None,
        strategy: Strategy = "semantic",
        interval: int | None = None,
    ) -> Slice:
        """The critical neurons. See :func:`nss_prune.profiling.selection.slice_profile`."""
        return slice_profile(
            self, theta, ratio=ratio, metric=metric, strategy=strategy, interval=interval
        )

    @staticmethod
    def merge(profiles: Iterable[Profile]) -> Profile:
        """The profile of all data, from profiles of its shards.

        Every shard is profiled with the same arguments and ``keep_statistics=True``. With "flat"
        the pairs of samples from different shards are compared as well.

        Raises:
            ArgumentError: No profiles, or one without its statistics.
            ModelMismatchError: They are of different models or arguments.
        """
        return merged(list(profiles))

    def save(self, path: str | os.PathLike[str], *, statistics: bool = False) -> None:
        """Write the profile as safetensors, whole or not at all.

        Args:
            statistics: Also the sums for :meth:`merge`, 8 Σ neurons² bytes a category (and with
                "flat" the activations).

        Raises:
            ArgumentError: There are no statistics to save.
            OSError: The file cannot be written.
        """
        if statistics and self.statistics is None:
            raise ArgumentError("the profile has no statistics; make it with keep_statistics=True")
        tensors, notes = _encode(self)
        if statistics and self.statistics is not None:
            more, notes["statistics"] = encode_statistics(self.statistics)
            tensors.update(more)
        write_profile(path, tensors, notes)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Profile:
        """Read what :meth:`save` wrote. A user's own metric must be registered to be merged.

        Sums of an earlier version that mean something else today are left out, with a note.

        Raises:
            FileFormatError: The file is damaged, foreign, or of a newer version.
            OSError: The file cannot be read.
        """
        return read_profile(path, _decode)


OUTDATED = (
    "the file's sums are of an earlier version, where 'flat' and 'var' were computed in another "
    "way; to merge them, profile that data anew"
)


def _encode(profile: Profile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, groups = encode_groups(profile.groups)
    for values in VALUES:
        for metric, layers in getattr(profile, values).items():
            for layer, tensor in layers.items():
                tensors[f"{values}/{metric}/{layer}"] = tensor
    return tensors, {
        "groups": groups,
        "left_alone": profile.neurons.left_alone,
        "left_alone_sizes": profile.neurons.left_alone_sizes,
        "metrics": profile.metrics,
        "categories": profile.categories,
        "samples": profile.samples,
        "interval": profile.interval,
        "ranked_by": profile.ranked_by,
        "used": profile.used,
        "unused": profile.unused,
        "notes": profile.notes,
    }


def _decode(tensors: dict[str, Tensor], notes: dict[str, Any]) -> Profile:
    neurons = NeuronMap(
        decode_groups(tensors, notes["groups"]), notes["left_alone"], notes["left_alone_sizes"]
    )
    contributions, overall, curves = (
        {
            metric: {
                group.name: tensors[f"{values}/{metric}/{group.name}"] for group in neurons.groups
            }
            for metric in notes["metrics"]
        }
        for values in VALUES
    )
    statistics, more = None, []
    if "statistics" in notes:
        layers = {group.name: group.size for group in neurons.groups}
        statistics = decode_statistics(tensors, notes["statistics"], layers)
        more = [] if statistics else [OUTDATED]
    return Profile(
        neurons=neurons,
        categories=tuple(tuple(part) for part in notes["categories"]),
        samples=tuple(notes["samples"]),
        contributions=contributions,
        overall=overall,
        curves=curves,
        interval=notes["interval"],
        notes=(*notes["notes"], *more),
        statistics=statistics,
        ranked_by=notes.get("ranked_by", "magnitude"),
        used=notes.get("used", sum(notes["samples"])),
        unused=notes.get("unused", 0),
    )


def profile_of(
    neurons: NeuronMap,
    scores: Scores,
    interval: int,
    minimum_samples: int,
    notes: tuple[str, ...] = (),
) -> Profile:
    """The profile of all categories that were added to ``scores``, with further notes.

    Raises:
        DataError: Fewer samples than ``minimum_samples``.
    """
    scores.check_samples(minimum_samples)
    parts = scores.ordered()
    return Profile(
        neurons=neurons,
        categories=tuple(parts),
        samples=tuple(scores.parts[part] for part in parts),
        contributions=scores.contributions(),
        overall=scores.overall(),
        curves=scores.curves(),
        interval=interval,
        notes=(*scores.notes(), *notes),
        statistics=scores.statistics(),
        ranked_by=scores.ranking,
        used=scores.used,
        unused=scores.unused,
    )


def merged(profiles: Sequence[Profile]) -> Profile:
    """See :meth:`Profile.merge`."""
    if not profiles:
        raise ArgumentError("no profile was given; merge at least one")
    kept = [profile.statistics for profile in profiles]
    statistics = [found for found in kept if found is not None]
    if len(statistics) < len(profiles):
        raise ArgumentError(
            "a profile has no statistics to merge; make each with keep_statistics=True"
        )
    first = profiles[0]
    for other, found in zip(profiles, statistics, strict=True):
        names = [metric.name for metric in found.metrics]
        if (
            other.layers != first.layers
            or names != [metric.name for metric in statistics[0].metrics]
            or found.landscape != statistics[0].landscape
            or other.ranked_by != first.ranked_by
        ):
            raise ModelMismatchError(
                "the profiles are of different models or arguments; profile every shard with "
                "the same model, metrics, features, centered, positions and ranking"
            )
    total = total_statistics(statistics)
    scores = Scores(
        first.groups, total.metrics, total.landscape, keep_statistics=True, ranking=first.ranked_by
    )
    for profile in profiles:
        scores.count(profile.used, profile.unused)
    for part, sums in total.parts():
        scores.add(part, sums)
    return profile_of(first.neurons, scores, first.interval, minimum_samples=2)
