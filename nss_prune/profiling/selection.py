"""Profile + theta or ratio -> Slice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from nss_prune.errors import ArgumentError
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.profiling.similarity import Ranking, ranked

Strategy = Literal["semantic", "category", "global"]

STRATEGIES = ("semantic", "category", "global")


class Profiled(Protocol):
    """What a slice is selected from, see :class:`nss_prune.Profile`."""

    @property
    def contributions(self) -> dict[str, dict[str, Tensor]]:
        """metric -> layer -> ``[categories, neurons]``."""
        ...

    @property
    def overall(self) -> dict[str, dict[str, Tensor]]:
        """metric -> layer -> ``[neurons]``, over all data."""
        ...

    @property
    def groups(self) -> tuple[NeuronGroup, ...]:
        """The neuron groups."""
        ...

    @property
    def ranked_by(self) -> Ranking:
        """How neurons are ranked by their contributions."""
        ...

    def metric_or_default(self, metric: str | None) -> str:
        """A metric that was profiled."""
        ...

    def entry_thresholds(self, metric: str, interval: int | None = None) -> dict[str, Tensor]:
        """Layer -> entry thresholds ``[categories, neurons]``."""
        ...


def slice_profile(
    profile: Profiled,
    theta: float | None = None,
    *,
    ratio: float | None = None,
    metric: str | None = None,
    strategy: Strategy = "semantic",
    interval: int | None = None,
) -> Slice:
    """The critical neurons of a profile, without another look at the data.

    Args:
        theta: For "semantic": the similarity threshold in (0, 1]; 0.95 by default.
        ratio: Share of each layer's neurons to take, in (0, 1]: the best of each category and
            their union ("category"), the best over all data ("global"), or those with the
            lowest entry thresholds ("semantic", in place of theta). At least one is taken.
        metric: One of ``profile.metrics``; the first by default.
        strategy: "semantic", Algorithm 1 for each category and their union (paper, section
            3.3); "category" or "global", the paper's section 2.3.
        interval: Neurons that Algorithm 1 adds at a time; the profile's own by default.

    Raises:
        ArgumentError: An argument is outside what it may be, or θ and ratio do not suit the
            strategy.
    """
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy is {strategy!r}; use one of {STRATEGIES}")
    chosen = profile.metric_or_default(metric)
    if ratio is None and strategy == "semantic":
        theta = check_theta(0.95 if theta is None else theta)
        lowest = union_thresholds(profile.entry_thresholds(chosen, interval))
        kept = {name: entry < theta for name, entry in lowest.items()}
        return Slice(kept, profile.groups, f"theta {theta:.6g} ({chosen})")
    if theta is not None or ratio is None or not 0 < ratio <= 1:
        raise ArgumentError(
            f"theta is {theta!r} and ratio {ratio!r} with strategy {strategy!r}; 'semantic' takes "
            "theta or a ratio in (0, 1], the others a ratio"
        )
    if strategy == "semantic":
        lowest = union_thresholds(profile.entry_thresholds(chosen, interval))
        scores = {name: 1 - entry[None] for name, entry in lowest.items()}
    elif strategy == "category":
        scores = profile.contributions[chosen]
    else:
        scores = {name: values[None] for name, values in profile.overall[chosen].items()}
    kept = {
        name: top_share(values, ratio, profile.ranked_by).any(0) for name, values in scores.items()
    }
    return Slice(kept, profile.groups, f"ratio {ratio:.6g} ({strategy}, {chosen})")


def top_share(scores: Tensor, ratio: float, ranking: Ranking = "magnitude") -> Tensor:
    """True for the best ``ratio`` of the last axis, at least one; ties by position."""
    count = max(1, round(ratio * scores.shape[-1]))
    best = ranked(scores, ranking)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


def union_thresholds(thresholds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entry thresholds of the union over categories: their minimum, ``[neurons]``."""
    return {name: values.min(0).values for name, values in thresholds.items()}


def check_theta(theta: float) -> float:
    """θ itself.

    Raises:
        ArgumentError: θ is outside (0, 1].
    """
    if not isinstance(theta, (int, float)) or not 0 < theta <= 1:
        raise ArgumentError(
            f"theta is {theta!r}; it is a similarity in (0, 1], in the paper 0.90 to 0.99"
        )
    return float(theta)
