"""Profile -> torch-pruning importance: one number for each neuron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nss_prune.errors import ModelMismatchError
from nss_prune.profiling.profile import Profile
from nss_prune.profiling.selection import union_thresholds


class NSSImportance:
    """Semantic importance for any torch-pruning pruner's ``importance=``.

    The importance of a neuron is 1 - e, with e the entry threshold of the union over the
    categories: pruning below 1 - θ keeps what Algorithm 1 keeps at θ. torch-pruning prunes
    everything that ties with its threshold, so ties are broken by the contribution.

    Args:
        profile: Of the model that is pruned.
        metric: One of ``profile.metrics``; the first by default.

    Attributes:
        scores: Layer -> importance of its neurons, all different, float32 ``[neurons]``.
    """

    def __init__(self, profile: Profile, metric: str | None = None) -> None:
        chosen = profile.metric_or_default(metric)
        contributions = profile.contributions[chosen]
        thresholds = union_thresholds(profile.thresholds[chosen])
        self.scores = {
            name: _without_ties(1 - entry, contributions[name].abs().mean(0))
            for name, entry in thresholds.items()
        }
        self._ties = {group.name: group.ties for group in profile.groups if group.has_channels}

    def __call__(self, group: Any) -> Tensor | None:
        """Importance of the neurons of a torch-pruning group, float32 ``[neurons]``.

        None, which torch-pruning takes as 'leave it alone', for groups that were not profiled,
        and for the heads of attention, which it would take apart.

        Over several steps of one pruner the scores follow the channels that are left.

        Raises:
            ModelMismatchError: The layer has other channels than those profiled.
        """
        graph = group._DG
        for dependency, _ in group:
            name = graph._module2name.get(dependency.target.module)
            if name in self._ties and graph.is_out_channel_pruning_fn(dependency.handler):
                break
        else:
            return None
        by_channel = self.scores[name].repeat(self._ties[name])
        width = graph.get_out_channels(dependency.target.module)
        left = _survivors(graph.pruning_history(), name, len(by_channel), width)
        if left is None:
            raise ModelMismatchError(
                f"{name} has {width} channels, {len(by_channel)} were profiled, and the pruner's "
                "history does not say which of them are left; profile the model as it is now, "
                "before each step"
            )
        return by_channel[left][torch.as_tensor(group[0].root_idxs)].contiguous()


def _survivors(
    history: Sequence[tuple[str, bool, Sequence[int]]], layer: str, before: int, now: int
) -> Tensor | None:
    """Of the channels that a layer had, those that the last steps of a pruner left, ``[now]``.

    Args:
        history: Layer, whether output channels went, and which, step after step.

    Returns:
        None where no number of last steps makes the difference.
    """
    steps: list[Sequence[int]] = []
    for name, outputs, gone in reversed(history):
        if before - sum(map(len, steps)) <= now:
            break
        if name == layer and outputs:
            steps.append(gone)
    if before - sum(map(len, steps)) != now:
        return None
    left = torch.arange(before)
    for gone in reversed(steps):
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[torch.as_tensor(gone, dtype=torch.long)] = False
        left = left[stays]
    return left


def _without_ties(importance: Tensor, contribution: Tensor) -> Tensor:
    """Distinct float32 values in the same order, ties ordered by contribution.

    Args:
        importance: In [0, 1], ``[neurons]``.
        contribution: ``[neurons]``.
    """
    by_position = -np.arange(len(importance))
    keys = (by_position, contribution.cpu().numpy(), importance.cpu().numpy())
    order = np.lexsort(keys)
    # The bits of floats that are not negative are integers in the same order, and the next float
    # has the next integer: each value is raised just above the one before it.
    bits = importance.float().abs().cpu().numpy()[order].view(np.int32).astype(np.int64)
    ranks = np.arange(len(bits))
    distinct = (np.maximum.accumulate(bits - ranks) + ranks).astype(np.int32).view(np.float32)
    values = np.empty_like(distinct)
    values[order] = distinct
    return torch.from_numpy(values).to(importance.device)
