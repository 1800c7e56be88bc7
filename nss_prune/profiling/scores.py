"""Contributions and similarity curves, from the sums of one category after the other."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from nss_prune.errors import DataError
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.profiling.categories import MINIMUM_SAMPLES
from nss_prune.profiling.contributions.protocol import Contribution
from nss_prune.profiling.kept import Statistics
from nss_prune.profiling.notes import notes_on_categories, notes_on_drawn, notes_on_samples
from nss_prune.profiling.similarity import Landscape, Ranking, ranked, similarity_curve
from nss_prune.profiling.streaming import Part, Sums


class Scores:
    """Contributions and curves, from the sums of one category after the other.

    Args:
        groups: The neurons.
        metrics: Contribution metrics.
        landscape: How observations were made of activations.
        keep_statistics: Keep the sums.
        ranking: How neurons are ranked by their contributions.

    Attributes:
        used: Number of samples that belong to a category.
        unused: Number of samples that belong to none.
        drawn: Categories of which a part was compared -> samples compared, and all samples.
        parts: Categories that count as one -> their samples.
        kept: Category -> its sums, where these are kept.
    """

    def __init__(
        self,
        groups: Sequence[NeuronGroup],
        metrics: Sequence[Contribution],
        landscape: Landscape,
        keep_statistics: bool,
        *,
        ranking: Ranking = "magnitude",
    ) -> None:
        self.groups = groups
        self.metrics = metrics
        self.landscape = landscape
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
        for group in self.groups:
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

    def check_samples(self, minimum: int) -> None:
        """Refuse to compare fewer samples than ``minimum``.

        Raises:
            DataError: There are fewer.
        """
        samples = sum(self.parts.values())
        if samples < minimum:
            raise DataError(
                f"the data has {samples} sample(s); at least {minimum} are needed to "
                f"compare, better {MINIMUM_SAMPLES} or more for each category"
            )

    def ordered(self) -> list[Part]:
        """The categories that count as one, in their order."""
        return sorted(self.parts)

    def contributions(self) -> dict[str, dict[str, Tensor]]:
        """metric -> layer -> ``[categories, neurons]``. They are handed over: ask once."""
        return self._by_metric(self._scores)

    def curves(self) -> dict[str, dict[str, Tensor]]:
        """metric -> layer -> similarity of every prefix. They are handed over: ask once."""
        return self._by_metric(self._curves)

    def overall(self) -> dict[str, dict[str, Tensor]]:
        """metric -> layer -> contributions over the samples of all categories, ``[neurons]``."""
        samples = sum(self.parts.values())
        return {
            metric.name: {
                group.name: metric.score(self._overall[metric.name, group.name][:, None] / samples)[
                    0
                ].cpu()
                for group in self.groups
            }
            for metric in self.metrics
        }

    def statistics(self) -> Statistics | None:
        """The sums, where these are kept."""
        if self.kept is None:
            return None
        return Statistics(tuple(self.metrics), self.landscape, self.kept)

    def notes(self) -> tuple[str, ...]:
        """What the report says about the categories and their samples."""
        return (
            *notes_on_categories(self.ordered()),
            *notes_on_samples(self.parts, self.used, self.unused),
            *notes_on_drawn(self.drawn),
        )

    def _by_metric(self, values: dict[tuple[str, str], Rows]) -> dict[str, dict[str, Tensor]]:
        added = list(self.parts)
        order = sorted(range(len(added)), key=added.__getitem__)
        # Each is dropped once it is in order: with many categories they are what is large.
        return {
            metric.name: {
                group.name: values.pop((metric.name, group.name)).in_order(order)
                for group in self.groups
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
