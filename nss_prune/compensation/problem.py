"""The least-squares problem of one consumer that loses channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nss_prune.statistics.moments import ConsumerStatistics


@dataclass(frozen=True)
class Problem:
    """What a consumer misses, and what is left to say it with.

    Units are channels, or the neurons of a flattened map with ``repeats`` channels each.

    Attributes:
        missing: Covariance of what is missed, ``[units, units]``.
        cross: Covariance of what is missed (rows) with what is left (columns).
        known: Covariance of what is left.
        whole: Covariance of what the consumer of the whole model reads.
        missing_mean: ``[units, repeats]``, and so are ``known_mean`` and ``whole_mean``.
        targets: True where something may be missed, ``[units]``, for each of the ridges that say
            it one after the other; what one leaves is for the next. The last are all of them.
        kept: True where something is left, ``[units]``.
        source: The statistics that all this is from.
    """

    missing: Tensor
    cross: Tensor
    known: Tensor
    whole: Tensor
    missing_mean: Tensor
    known_mean: Tensor
    whole_mean: Tensor
    targets: tuple[Tensor, ...]
    kept: Tensor
    source: ConsumerStatistics

    def split(self, groups: int) -> list[Problem]:
        """The problems of the channel groups, which do not read each other's channels."""
        size = len(self.kept) // groups
        parts = []
        for start in range(0, len(self.kept), size):
            units = slice(start, start + size)
            pairs = (units, units)
            parts.append(
                Problem(
                    self.missing[pairs],
                    self.cross[pairs],
                    self.known[pairs],
                    self.whole[pairs],
                    self.missing_mean[units],
                    self.known_mean[units],
                    self.whole_mean[units],
                    tuple(target[units] for target in self.targets),
                    self.kept[units],
                    self.source,
                )
            )
        return parts


def resolved(statistics: ConsumerStatistics, repeats: int, kept: int) -> ConsumerStatistics:
    """Neuron by neuron, where the channels of a flattened map are too many for the samples."""
    return statistics if statistics.observations >= 2 * kept else statistics.by_neuron(repeats)


def missing_channels(statistics: ConsumerStatistics, removed: Tensor) -> Problem:
    """The removed channels are missed, the others are as they were."""
    covariance = statistics.covariance
    mean = statistics.mean.view(len(covariance), -1)
    gone = removed.view(mean.shape)[:, 0].to(mean.device)
    return Problem(
        missing=covariance,
        cross=covariance,
        known=covariance,
        whole=covariance,
        missing_mean=mean * gone[:, None],
        known_mean=mean,
        whole_mean=mean,
        targets=(gone,),
        kept=~gone,
        source=statistics,
    )


def changed_channels(both: ConsumerStatistics, removed: Tensor) -> Problem:
    """Whatever the sliced model gives otherwise than the whole one is missed.

    Args:
        both: Of ``[2 channels]``, see :func:`_both_readings`.
    """
    units = len(both.covariance) // 2
    whole, part = both.mean.view(2, units, -1)
    by_model = both.covariance.view(2, units, 2, units)
    first, second, mixed = by_model[0, :, 0], by_model[1, :, 1], by_model[0, :, 1]
    gone = removed.view(whole.shape)[:, 0].to(whole.device)
    return Problem(
        missing=first - mixed - mixed.T + second,
        cross=mixed - second,
        known=second,
        whole=first,
        missing_mean=whole - part,
        known_mean=part,
        whole_mean=whole,
        targets=(gone, torch.ones_like(gone)),
        kept=~gone,
        source=both,
    )
