"""Mean and covariance of a stream, with the number of independent observations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nss_prune.core.processes import processes, summed
from nss_prune.errors import NumericalError
from nss_prune.statistics.covariance import Covariance, add_over_processes
from nss_prune.statistics.positions import positions, spaced


@dataclass(frozen=True)
class ConsumerStatistics:
    """What one consumer reads, over all samples and positions.

    Attributes:
        mean: ``[channels]``, float64.
        covariance: ``[channels, channels]``, float64. Of a flattened map of more than
            ``WIDEST_MAP`` channels ``[neurons, neurons]``: the average over the positions of the
            map, each with its own mean.
        rows: Number of (sample, position) pairs.
        samples: Number of samples, each of their views counted.
        observations: The number of independent observations that the rows are worth, because
            the positions of a sample resemble each other: rows over the design effect of cluster
            sampling (Kish, Survey Sampling, 1965), which is samples · tr Σ / tr Σ̄ where Σ̄ is
            the covariance of the samples' averages over their positions.
        shape: Of the input, without the samples.
        norm: The BatchNorm that reads what the consumer puts out, and alone does so, or None.
    """

    mean: Tensor
    covariance: Tensor
    rows: int
    samples: int
    observations: float
    shape: tuple[int, ...]
    norm: str | None = None

    def to(self, device: torch.device | str) -> ConsumerStatistics:
        """The same on another device."""
        return replace(self, mean=self.mean.to(device), covariance=self.covariance.to(device))

    @property
    def repeats(self) -> int:
        """Channels that each row of the covariance stands for."""
        return len(self.mean) // len(self.covariance)

    def by_neuron(self, repeats: int) -> ConsumerStatistics:
        """The covariance of the neurons of a flattened map that has ``repeats`` positions."""
        if self.repeats == repeats:
            return self
        neurons = len(self.mean) // repeats
        blocks = self.covariance.view(neurons, repeats, neurons, repeats)
        covariance = blocks.diagonal(dim1=1, dim2=3).mean(-1)
        rows = self.rows * repeats
        between = float(blocks.mean((1, 3)).trace())
        worth = independent(self.samples, rows, float(covariance.trace()), between)
        return replace(self, covariance=covariance, rows=rows, observations=worth)


class Moments:
    """Mean and covariance of a stream, in float64, and how much its rows resemble each other.

    Args:
        channels: Of the stream.
        repeats: Channels that each row of the covariance stands for.
        views: Of each sample, one after the other.
        device: Where the sums are.

    Attributes:
        samples: Number of samples, each of their views counted.
        rows: Number of (sample, position) pairs.
    """

    def __init__(
        self,
        channels: int,
        repeats: int = 1,
        views: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.repeats = repeats
        self.views = views
        self.samples = self.rows = 0
        units = channels // repeats
        self._picked = positions((repeats,))
        self._total = torch.zeros(units, repeats, dtype=torch.float64, device=device)
        self._rows = Covariance(units, len(self._picked), device, torch.float64)
        # Σ of the units' variances: a scatter of one channel that has them as repeats.
        self._by_view = Covariance(1, units, device, torch.float64)
        self._by_sample = Covariance(1, units, device, torch.float64)
        self._found: ConsumerStatistics | None = None

    def add(self, values: Tensor, shape: Sequence[int] | None = None) -> None:
        """Add ``[samples, channels, positions]``.

        Args:
            shape: Of the map whose positions these are; one axis where it is not known.
        """
        seen = spaced(values, 2, shape)
        samples, channels, count = seen.shape
        seen = seen.reshape(samples, channels // self.repeats, self.repeats, count)
        self._total += seen.sum((0, 3), dtype=torch.float64)
        picked = spaced(seen, 2)
        # A copy: the rows wait for others, and what follows may write to them.
        rows = picked.permute(1, 0, 3, 2).clone(memory_format=torch.contiguous_format)
        self._rows.add(rows.flatten(1, 2))
        by_view = picked.double().mean((2, 3))
        self._by_view.add(by_view[None])
        self._by_sample.add(by_view.unflatten(0, (-1, self.views)).mean(1)[None])
        self.samples += samples
        self.rows += samples * count
        self._found = None

    def statistics(self, name: str, shape: tuple[int, ...], norm: str | None) -> ConsumerStatistics:
        """Of everything added.

        Raises:
            NumericalError: Something added was NaN or infinite.
        """
        if self._found is None:
            self._found = self._statistics(name)
        return replace(self._found, shape=shape, norm=norm)

    def distinct(self, name: str) -> float:
        """Observations for what adds up over a sample: its views resemble each other as well.

        As ``observations`` of :class:`ConsumerStatistics`, with averages over positions and views.
        """
        found = self.statistics(name, (), None)
        samples = self.samples / self.views
        between = _variance(self._by_sample)
        return independent(samples, found.rows, float(found.covariance.trace()), between)

    def _statistics(self, name: str) -> ConsumerStatistics:
        mean, scatter = (self._total / self.rows).flatten(), self._rows.scatter
        if not torch.isfinite(scatter.sum() + mean.sum()):
            raise NumericalError(
                f"{name} reads NaN or infinite values; check the data and the model's weights"
            )
        rows = self.rows * len(self._picked)
        covariance = (scatter + scatter.T).div_(2 * rows)
        between = _variance(self._by_view)
        return ConsumerStatistics(
            mean=mean,
            covariance=covariance,
            rows=rows,
            samples=self.samples,
            observations=independent(self.samples, rows, float(covariance.trace()), between),
            shape=(),
        )


def add_moments_over_processes(moments: Sequence[Moments]) -> None:
    """Replace each by that of the samples of all processes, in place."""
    if processes() == 1:
        return
    totals = [each._total for each in moments]
    counts = [each._total.new_tensor([each.samples, each.rows]) for each in moments]
    summed([*totals, *counts])
    for each, count in zip(moments, counts, strict=True):
        each.samples, each.rows = (int(number) for number in count.round())
        each._found = None
    parts = [[each._rows, each._by_view, each._by_sample] for each in moments]
    add_over_processes([part for each in parts for part in each])


def _variance(averages: Covariance) -> float:
    """Σ of the variances of all units."""
    return float(averages.scatter) / max(1, averages.rows)


def independent(samples: float, rows: int, variance: float, between: float) -> float:
    """Independent observations in rows that come in clusters, see :class:`ConsumerStatistics`."""
    if between * rows <= variance * samples:
        return float(rows)
    return samples * max(1.0, variance / between)
