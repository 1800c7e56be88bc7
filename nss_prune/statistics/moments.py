"""Mean and covariance of a stream, with the number of independent observations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nss_prune.errors import NumericalError
from nss_prune.statistics.positions import spaced


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
    """Mean and covariance of a stream, in float64 around the mean of its first batch.

    Args:
        repeats: Channels that each row of the covariance stands for.
        views: Of each sample, one after the other.
    """

    def __init__(self, repeats: int = 1, views: int = 1) -> None:
        self.repeats = repeats
        self.views = views
        self.samples = 0
        self.rows = 0
        self._shift: Tensor | None = None
        self._found: ConsumerStatistics | None = None

    def add(self, values: Tensor, shape: Sequence[int] | None = None) -> None:
        """Add ``[samples, channels, positions]``.

        Args:
            shape: Of the map whose positions these are; one axis where it is not known.
        """
        seen = spaced(values, 2, shape).double()
        samples, channels, positions = seen.shape
        seen = seen.reshape(samples, channels // self.repeats, self.repeats, positions)
        if self._shift is None:
            self._shift = seen.mean((0, 3))
            units = len(self._shift)
            self._total = torch.zeros_like(self._shift)
            self._matrix = seen.new_zeros(units, units)
            self._by_view, self._by_sample = seen.new_zeros(2, 2, units)
        centred = seen - self._shift[:, :, None]
        self._total += centred.sum((0, 3))
        picked = spaced(centred, 2)
        by_unit = picked.transpose(0, 1).flatten(1)
        self._matrix += by_unit @ by_unit.T
        by_view = picked.mean((2, 3))
        by_sample = by_view.unflatten(0, (-1, self.views)).mean(1)
        self._by_view += torch.stack([by_view.sum(0), by_view.square().sum(0)])
        self._by_sample += torch.stack([by_sample.sum(0), by_sample.square().sum(0)])
        self.samples += samples
        self.rows += samples * positions
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
        between = _variance(self._by_sample / samples)
        return independent(samples, found.rows, float(found.covariance.trace()), between)

    def _statistics(self, name: str) -> ConsumerStatistics:
        assert self._shift is not None
        offset = self._total / self.rows
        if not torch.isfinite(self._matrix.sum() + offset.sum()):
            raise NumericalError(
                f"{name} reads NaN or infinite values; check the data and the model's weights"
            )
        picked = spaced(offset, 1)
        rows = self.rows * picked.shape[1]
        covariance = self._matrix / rows
        covariance.addmm_(picked, picked.T, alpha=-1 / picked.shape[1])
        covariance = covariance.add_(covariance.T.clone()).div_(2)
        between = _variance(self._by_view / self.samples)
        return ConsumerStatistics(
            mean=(self._shift + offset).flatten(),
            covariance=covariance,
            rows=rows,
            samples=self.samples,
            observations=independent(self.samples, rows, float(covariance.trace()), between),
            shape=(),
        )


def _variance(averages: Tensor) -> float:
    """Σ of the variances, from averages of values and of their squares, ``[2, units]``."""
    mean, square = averages
    return float((square - mean.square()).sum())


def independent(samples: float, rows: int, variance: float, between: float) -> float:
    """Independent observations in rows that come in clusters, see :class:`ConsumerStatistics`."""
    if between * rows <= variance * samples:
        return float(rows)
    return samples * max(1.0, variance / between)
