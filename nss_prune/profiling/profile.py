"""Profile: contributions and similarity curves of every neuron."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nss_prune.core.files import read_file, write_file
from nss_prune.core.text import elided, listing, shortened
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError
from nss_prune.graph.encoding import decode_groups, encode_groups
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.profiling.categories import MINIMUM_SAMPLES, joined
from nss_prune.profiling.contributions.protocol import Contribution
from nss_prune.profiling.kept import Statistics, decode_statistics, encode_statistics
from nss_prune.profiling.notes import notes_on_categories, notes_on_drawn, notes_on_samples
from nss_prune.profiling.selection import Strategy, slice_profile
from nss_prune.profiling.similarity import (
    Landscape,
    Ranking,
    check_interval,
    entry_thresholds,
    ranked,
    similarity_curve,
)
from nss_prune.profiling.streaming import Part, Sums
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
        notes: What a reader of the report should know.
        statistics: The sums, where ``profile(..., keep_statistics=True)`` kept them.
        readers: What every reader reads, where ``profile(..., keep_readers=True)`` kept it: what
            folding needs. It is not saved.
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
    readers: dict[str, ConsumerStatistics] | None = field(default=None, repr=False)
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
        write_file(path, KIND, tensors, notes)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Profile:
        """Read what :meth:`save` wrote. A user's own metric must be registered to be merged.

        Sums of an earlier version that mean something else today are left out, with a note.

        Raises:
            FileFormatError: The file is damaged, foreign, or of a newer version.
            OSError: The file cannot be read.
        """
        return _decode(*read_file(path, KIND))


KIND = "nss_prune profile"
VALUES = ("contributions", "overall", "curves")
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
        statistics = decode_statistics(tensors, notes["statistics"])
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


class ProfileBuilder:
    """Turns the sums of one category after the other into contributions and curves."""

    def __init__(
        self,
        neurons: NeuronMap,
        metrics: Sequence[Contribution],
        landscape: Landscape,
        interval: int,
        keep_statistics: bool,
        *,
        ranking: Ranking = "magnitude",
    ) -> None:
        self.neurons = neurons
        self.metrics = metrics
        self.landscape = landscape
        self.interval = interval
        self.ranking = ranking
        self.used = self.unused = 0
        self.drawn: dict[Part, tuple[int, int]] = {}
        self.parts: dict[Part, int] = {}
        self.kept: Sums | None = {} if keep_statistics else None
        self._scores: dict[tuple[str, str], Rows] = {}
        self._curves: dict[tuple[str, str], Rows] = {}
        self._overall: dict[tuple[str, str], Tensor] = {}

    def count(self, used: int, unused: int) -> None:
        """Count samples that belong to a category, and samples that do not."""
        self.used += used
        self.unused += unused

    def add(self, part: Part, whole: Sums) -> None:
        """Add categories that count as one, with all of their samples."""
        sums = functools.reduce(operator.add, whole.values())
        self.parts[part] = sums.samples
        if self.kept is not None:
            self.kept.update(whole)
        for group in self.neurons.groups:
            found = sums.groups[group.name]
            kernel = found.landscape.kernel(self.landscape)
            drawn = found.landscape.drawn
            if drawn is not None and len(drawn.keys) < drawn.seen:
                self.drawn[part] = (len(drawn.keys), drawn.seen)
            for metric in self.metrics:
                key = (metric.name, group.name)
                total = found.statistics[metric.name]
                score = metric.score(total[:, None] / sums.samples)[0]
                self._scores.setdefault(key, Rows()).append(score)
                curve = similarity_curve(kernel, ranked(score, self.ranking))
                self._curves.setdefault(key, Rows()).append(curve)
                self._overall.setdefault(key, torch.zeros_like(total)).add_(total)

    def build(self, minimum_samples: int, notes: tuple[str, ...] = ()) -> Profile:
        """The profile, with further notes.

        Raises:
            DataError: Fewer samples than ``minimum_samples``.
        """
        samples = sum(self.parts.values())
        if samples < minimum_samples:
            raise DataError(
                f"the data has {samples} sample(s); at least {minimum_samples} are needed to "
                f"compare, better {MINIMUM_SAMPLES} or more for each category"
            )
        added = list(self.parts)
        order = sorted(range(len(added)), key=added.__getitem__)
        parts = [added[i] for i in order]
        return Profile(
            neurons=self.neurons,
            categories=tuple(parts),
            samples=tuple(self.parts[part] for part in parts),
            contributions=self._by_metric(self._scores, order),
            overall={
                metric.name: {
                    group.name: metric.score(
                        self._overall[metric.name, group.name][:, None] / samples
                    )[0].cpu()
                    for group in self.neurons.groups
                }
                for metric in self.metrics
            },
            curves=self._by_metric(self._curves, order),
            interval=self.interval,
            notes=(
                *notes_on_categories(parts),
                *notes_on_samples(self.parts, self.used, self.unused),
                *notes_on_drawn(self.drawn),
                *notes,
            ),
            statistics=None
            if self.kept is None
            else Statistics(tuple(self.metrics), self.landscape, self.kept),
            ranked_by=self.ranking,
            used=self.used,
            unused=self.unused,
        )

    def _by_metric(
        self, values: dict[tuple[str, str], Rows], order: Sequence[int]
    ) -> dict[str, dict[str, Tensor]]:
        # Each is dropped once it is in order: with many categories they are what is large.
        return {
            metric.name: {
                group.name: values.pop((metric.name, group.name)).in_order(order)
                for group in self.neurons.groups
            }
            for metric in self.metrics
        }


class Rows:
    """Rows of one length, in one tensor that doubles: small ones would leave the heap in pieces."""

    def __init__(self) -> None:
        self._count = 0
        self._rows = torch.empty(0)

    def append(self, row: Tensor) -> None:
        """Add a row, ``[length]``."""
        if self._count == len(self._rows):
            longer = torch.empty(max(8, 2 * self._count), len(row), dtype=row.dtype)
            longer[: self._count] = self._rows[: self._count].view(self._count, len(row))
            self._rows = longer
        self._rows[self._count] = row
        self._count += 1

    def in_order(self, order: Sequence[int]) -> Tensor:
        """Some of the rows, ``[order, length]``."""
        return self._rows[list(order)]


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
    total: Sums = {}
    for found in statistics:
        for category, sums in found.sums.items():
            total[category] = total[category] + sums if category in total else sums
    builder = ProfileBuilder(
        first.neurons,
        statistics[0].metrics,
        statistics[0].landscape,
        first.interval,
        True,
        ranking=first.ranked_by,
    )
    for profile in profiles:
        builder.count(profile.used, profile.unused)
    for part in joined({category: sums.samples for category, sums in total.items()}).values():
        builder.add(part, {category: total[category] for category in part})
    return builder.build(2)
