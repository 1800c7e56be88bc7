"""How far the outputs really move for some numbers of neurons that go, from one more pass.

What is predicted of a group (:mod:`nss_prune.allocation.elimination`) leaves out that errors of
neighbouring positions are alike, and that large gradients meet large errors. Here the change of
every input of a consumer is multiplied by its gradient and summed over a sample, e = Σ g Δ, and
½ E[e²] is the divergence of the outputs in the same second order. All groups are measured together
in a forward and a backward pass at :data:`LEVELS` numbers of neurons each; between these, what is
more than predicted is interpolated, and so is the share of the prediction where it is less.

D is as measured, or as predicted where that is more by no more than chance explains: in few samples
the largest of the squares, which most of their average comes from, are likely to be missing. For
heads it is as measured: the prediction folds them as wholes, the removal their channels one by one,
which makes up for far more.

Dimensions inside heads leave the products of queries and keys as well, which adds to their e.

A norm over the neurons of a layer, as on the trunk of a transformer, normalises what stays by other
statistics when some go. What this changes is measured in the same way, at the norm's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nss_prune.allocation.effects_pass import EffectsPass
from nss_prune.allocation.elimination import Elimination
from nss_prune.allocation.group_changes import GroupChanges
from nss_prune.allocation.interactions import Interactions
from nss_prune.core.batches import has_samples
from nss_prune.core.models import Forward, call_model
from nss_prune.core.outputs import Outputs, outputs_of
from nss_prune.core.processes import agreed
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.statistics.moments import ConsumerStatistics

LEVELS = 8  # numbers of neurons of a layer that are measured, evenly spaced
LEAST_SAMPLES = 100  # an average of fewer squares is mostly noise
MOST_SAMPLES = 2000  # more of them cost time and change little
CHANCE = 2.0  # standard errors by which the average of the squares may be too small
MOST_VALUES = 2**28  # of folds that are kept at once, 1 GiB


@agreed()
def measured(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    found: Mapping[str, Elimination],
    statistics: Mapping[str, ConsumerStatistics] | None,
    *,
    seed: int = 0,
    outputs: Outputs | None = None,
    forward: Forward = call_model,
    progress: bool | None = None,
    interactions: Interactions | None = None,
    memory_limit: float = math.inf,
) -> dict[str, Elimination]:
    """Eliminations with the divergence measured, on at most :data:`MOST_SAMPLES` samples.

    It takes a forward and a backward pass, and another one for every :data:`MOST_VALUES` values
    that the folds mix with, or fewer by ``memory_limit``. The model is left as found.

    Args:
        data: Batches that can be iterated again.
        found: By :func:`nss_prune.allocation.elimination.eliminations`.
        statistics: Of the consumers' inputs, to fold with; None where nothing is folded.
        seed: For what is drawn at random.
        outputs: What the outputs mean; found from the first batch by default.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.
        interactions: To add what the layers do together to, in the same pass.
        memory_limit: Bytes for what the folds of a pass mix with.

    Returns:
        What was found where there are fewer than :data:`LEAST_SAMPLES` samples.

    Raises:
        ArgumentError: It is not certain what the outputs mean; give ``outputs``.
        DataError: The data is empty, or the model refuses it.
    """
    counts = {group.name: _counts(group.size) for group in groups if group.name in found}
    counts = {name: levels for name, levels in counts.items() if len(levels)}
    known = dict(found)
    if not counts or not has_samples(data, LEAST_SAMPLES):
        return known
    outputs = outputs or outputs_of(model, data, forward=forward, progress=progress)
    most = int(min(MOST_VALUES, memory_limit // 8))  # as many again are inverse covariances
    changes = GroupChanges(model, groups, statistics, most // 2)
    watched = Interactions() if interactions is None else interactions
    part = EffectsPass(model, MOST_SAMPLES)
    for group in groups:
        if group.name not in counts:
            continue
        order, levels = found[group.name].order.cpu(), counts[group.name].tolist()
        part.add(group, *changes.of(group, order, levels))
        if part.values >= most:
            effects = part.products_of_effects(data, seed, outputs, forward, progress)
            known.update(_measured(part, found, counts, *effects, watched))
            part = EffectsPass(model, MOST_SAMPLES)
    if part.layers:
        effects = part.products_of_effects(data, seed, outputs, forward, progress)
        known.update(_measured(part, found, counts, *effects, watched))
    return known


def _measured(
    part: EffectsPass,
    found: Mapping[str, Elimination],
    counts: Mapping[str, Tensor],
    products: Tensor,
    errors: Tensor,
    interactions: Interactions,
) -> dict[str, Elimination]:
    """Layer -> its elimination, of all layers of a part; their products join the interactions."""
    interactions.add({name: counts[name] for name in part.layers}, products)
    levels = [len(counts[name]) for name in part.layers]
    least = products.diagonal() / 2
    most = least + CHANCE * errors / 2
    by_layer = zip(part.layers, least.split(levels), most.split(levels), strict=True)
    return {
        name: _corrected(found[name], counts[name], low, low if name in part.by_channel else high)
        for name, low, high in by_layer
    }


def _corrected(found: Elimination, counts: Tensor, least: Tensor, most: Tensor) -> Elimination:
    """An elimination whose D is known within bounds after some numbers of neurons.

    Args:
        counts: Those numbers, ascending, ``[levels]``.
        least: D as measured on the samples that the consumers were folded with, ``[levels]``.
        most: What chance explains, ``[levels]``.
    """
    predicted = found.divergence.cpu()
    growth = torch.ones_like(predicted) if found.growth is None else found.growth.cpu()
    growth, foreseen = growth[counts - 1] ** 2, predicted[counts - 1]
    known = foreseen.clamp(least * growth, most * growth)
    numbers, knots = np.arange(1, len(predicted) + 1), counts.numpy()
    more = np.interp(numbers, [0, *knots], [0, *(known - foreseen).clamp(min=0)])
    share = np.interp(numbers, knots, (known / foreseen).nan_to_num(1).clamp(max=1))
    curve = predicted * torch.from_numpy(share) + torch.from_numpy(more)
    return replace(found, divergence=curve.cummax(0).values.to(found.divergence))


def effect_passes(
    groups: Sequence[NeuronGroup], consumers: Mapping[str, int], memory_limit: float = math.inf
) -> tuple[int, int]:
    """How many passes :func:`measured` takes, and the bytes of factors that one keeps at most.

    Args:
        consumers: Consumer -> values of the covariance of its input; empty where nothing is folded.
    """
    most = min(MOST_VALUES, memory_limit // 8)
    parts = [0]
    for group in groups:
        if parts[-1] >= most:
            parts.append(0)
        names = {member.name for member in group.consumers}
        parts[-1] += sum(consumers.get(name, 0) for name in names)
    return len(parts), 4 * max(parts)


def _counts(size: int) -> Tensor:
    """Numbers of neurons that go, up to all but one."""
    counts: Tensor = torch.linspace(0, size - 1, LEVELS + 1).round().long().unique()
    return counts[1:]
