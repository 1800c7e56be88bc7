"""How far the outputs really move for some numbers of neurons that go, from one more pass.

What is predicted of a group (:mod:`nss_prune.allocation.elimination`) leaves out that errors of
neighbouring positions are alike, and that large gradients meet large errors. Here the change of
every input of a consumer is multiplied by its gradient and summed over a sample, e = Σ g Δ, and
½ E[e²] is the divergence of the outputs in the same second order. All groups are measured together
in a forward and a backward pass at :data:`LEVELS` numbers of neurons each; between these, what is
more than predicted is interpolated. Where less is measured than predicted, D is as predicted: what
cancels over the positions of a map, or in the samples at hand, need not cancel when other layers
change too. Not so for heads: the prediction folds them as wholes, the removal their channels one by
one, which makes up for far more, and D is as measured.

Dimensions inside heads leave the products of queries and keys as well, which adds to their e.

A norm over the neurons of a layer, as on the trunk of a transformer, normalises what stays by other
statistics when some go. What this changes is measured in the same way, at the norm's output.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nss_prune.allocation.changes import ConsumerChange, NormChange
from nss_prune.allocation.elimination import Elimination
from nss_prune.allocation.group_changes import GroupChanges
from nss_prune.allocation.interactions import Interactions
from nss_prune.core.arguments import heads_called, on_input
from nss_prune.core.batches import as_computed, counted_batches, has_samples
from nss_prune.core.draws import Draws
from nss_prune.core.models import Forward, call_model, device_of, evaluation, run, submodule
from nss_prune.core.outputs import Outputs, outputs_of
from nss_prune.core.processes import agreed, processes, summed
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.statistics.capture import by_sample
from nss_prune.statistics.moments import ConsumerStatistics

LEVELS = 8  # numbers of neurons of a layer that are measured, evenly spaced
LEAST_SAMPLES = 100  # an average of fewer squares is mostly noise
MOST_SAMPLES = 2000  # more of them cost time and change little
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
    """Eliminations with at least the divergence measured, on at most :data:`MOST_SAMPLES` samples.

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
    part = _Part(model)
    for group in groups:
        if group.name not in counts:
            continue
        order, levels = found[group.name].order.cpu(), counts[group.name].tolist()
        part.add(group, *changes.of(group, order, levels))
        if part.values >= most:
            products = part.products_of_effects(data, seed, outputs, forward, progress)
            known.update(_measured(part, found, counts, products, watched))
            part = _Part(model)
    if part.layers:
        products = part.products_of_effects(data, seed, outputs, forward, progress)
        known.update(_measured(part, found, counts, products, watched))
    return known


def _measured(
    part: _Part,
    found: Mapping[str, Elimination],
    counts: Mapping[str, Tensor],
    products: Tensor,
    interactions: Interactions,
) -> dict[str, Elimination]:
    """Layer -> its elimination, of all layers of a part; their products join the interactions."""
    interactions.add({name: counts[name] for name in part.layers}, products)
    by_layer = (products.diagonal() / 2).split([len(counts[name]) for name in part.layers])
    return {
        name: _scaled(found[name], counts[name], divergence, name in part.by_channel)
        for name, divergence in zip(part.layers, by_layer, strict=True)
    }


def _scaled(found: Elimination, counts: Tensor, measured: Tensor, by_channel: bool) -> Elimination:
    """An elimination whose D is at least what was measured after some numbers of neurons.

    Args:
        counts: Those numbers, ascending, ``[levels]``.
        measured: D on the samples that the consumers were folded with, ``[levels]``.
        by_channel: Whether D is as measured also where that is less.
    """
    predicted = found.divergence.cpu()
    growth = torch.ones_like(predicted) if found.growth is None else found.growth.cpu()
    excess = measured * growth[counts - 1] ** 2 - predicted[counts - 1]
    excess = excess if by_channel else excess.clamp(min=0)
    more = np.interp(np.arange(1, len(predicted) + 1), [0, *counts.tolist()], [0, *excess.tolist()])
    curve = (predicted + torch.from_numpy(more)).cummax(0).values
    return replace(found, divergence=curve.to(found.divergence))


def effect_passes(
    groups: Sequence[NeuronGroup], consumers: Mapping[str, int], memory_limit: float = math.inf
) -> tuple[int, int]:
    """How many passes :func:`measured` takes, and the bytes that the folds of one mix with.

    Args:
        consumers: Consumer -> values of the covariance of its input; empty where nothing is folded.
    """
    most = min(MOST_VALUES, memory_limit // 8)
    parts = [0]
    for group in groups:
        if parts[-1] >= most:
            parts.append(0)
        shares = _counts(group.size).double() / group.size
        mixed = float((shares * (1 - shares)).sum())
        names = {member.name for member in group.consumers}
        pairs = sum(consumers.get(name, 0) for name in names)
        parts[-1] += int(mixed * pairs)
    return len(parts), 4 * max(parts)


def _counts(size: int) -> Tensor:
    """Numbers of neurons that go, up to all but one."""
    counts: Tensor = torch.linspace(0, size - 1, LEVELS + 1).round().long().unique()
    return counts[1:]


class _Part:
    """Groups that are measured in the same pass.

    Attributes:
        layers: In the order added.
        by_channel: Those whose neurons have several channels each, which are folded one by one.
        values: That the folds mix with.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[str] = []
        self.by_channel: set[str] = set()
        self.levels = self.values = 0
        self.consumers: dict[str, list[tuple[slice, ConsumerChange]]] = {}
        self.sample_axes: dict[str, int] = {}
        self.norms: dict[str, list[tuple[slice, NormChange]]] = {}
        self.queries: dict[str, list[tuple[slice, ConsumerChange]]] = {}

    def add(
        self,
        group: NeuronGroup,
        consumers: Mapping[str, ConsumerChange],
        norms: Mapping[str, NormChange],
        queries: Mapping[str, ConsumerChange],
    ) -> None:
        """Add the changes of a group, which all have the same levels."""
        self.sample_axes.update(
            (member.name, member.sample_axis) for member in group.members if member.side != "out"
        )
        levels = next(len(change.gone) for change in consumers.values())
        where = slice(self.levels, self.levels + levels)
        for name, change in consumers.items():
            self.consumers.setdefault(name, []).append((where, change))
            self.values += change.values
        for name, norm_change in norms.items():
            self.norms.setdefault(name, []).append((where, norm_change))
        for name, change in queries.items():
            self.queries.setdefault(name, []).append((where, change))
        if group.queries is not None:
            self.sample_axes[group.queries.name] = group.queries.sample_axis
        self.layers.append(group.name)
        if not group.has_channels and any(change.mixing for change in consumers.values()):
            self.by_channel.add(group.name)
        self.levels = where.stop

    def products_of_effects(
        self,
        data: Iterable[Any],
        seed: int,
        outputs: Outputs,
        forward: Forward,
        progress: bool | None,
    ) -> Tensor:
        """Mean of e eᵀ over the samples, float64 ``[levels, levels]``."""
        total = torch.zeros(self.levels, self.levels, dtype=torch.float64)
        seen = 0
        with evaluation(self.model), torch.enable_grad():
            for number, inputs, samples in counted_batches(self.model, data, progress, "effects"):
                effects = torch.zeros(self.levels, samples, dtype=torch.float64)
                with self._watched(effects):
                    given = run(self.model, inputs, number, forward)
                    outputs.drawn_loss(given, Draws(inputs, seed)).backward()
                total += effects @ effects.T
                seen += samples
                if seen >= MOST_SAMPLES / processes():
                    break
        counts = torch.tensor([float(seen)], dtype=torch.float64)
        sums = [total.to(device_of(self.model)), counts.to(device_of(self.model))]
        summed(sums)
        return (sums[0] / sums[1]).cpu()

    @contextlib.contextmanager
    def _watched(self, effects: Tensor) -> Iterator[None]:
        """Add e of each level and sample to ``effects``, ``[levels, samples]``, inside."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(heads_called(self.model))
            for name, changes in self.consumers.items():
                module = submodule(self.model, name)
                hook = _input_hook(name, changes, self.sample_axes[name], effects)
                stack.callback(on_input(module, hook).remove)
            for name, norm_changes in self.norms.items():
                module = submodule(self.model, name)
                norm_hook = _norm_hook(norm_changes, self.sample_axes[name], effects)
                stack.callback(module.register_forward_hook(norm_hook).remove)
            for name, changes in self.queries.items():
                module = submodule(self.model, name)
                output_hook = _output_hook(name, changes, self.sample_axes[name], effects)
                stack.callback(module.register_forward_hook(output_hook).remove)
            yield


def _input_hook(
    name: str,
    changes: Sequence[tuple[slice, ConsumerChange]],
    sample_axis: int,
    effects: Tensor,
) -> Any:
    """For the input of a consumer: e is added in the backward pass."""
    samples = effects.shape[1]

    def read(module: nn.Module, given: Tensor) -> Tensor:
        # A copy: what follows may write to the original, and the gradient is this consumer's alone.
        tap = given.clone()
        inputs = tap.detach().movedim(sample_axis, 0)
        if not tap.requires_grad:
            tap.requires_grad_()

        def add(gradient: Tensor) -> None:
            values = as_computed(by_sample(name, inputs, module, samples))
            moved = gradient.movedim(sample_axis, 0)
            slope = as_computed(by_sample(name, moved, module, samples))
            for levels, change in changes:
                if max(change.gone):
                    effects[levels] += change.effects(values, slope).double().cpu()

        tap.register_hook(add)
        return tap

    return read


def _output_hook(
    name: str,
    changes: Sequence[tuple[slice, ConsumerChange]],
    sample_axis: int,
    effects: Tensor,
) -> Any:
    """For the output of a layer: e is added in the backward pass.

    Where dimension j of a query goes, the scores lose q_j k_j, and Σ G q_j k_j over all scores,
    with G the gradient by them, is Σ g_j q_j over the queries.
    """
    samples = effects.shape[1]

    def made(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        tap = output if output.requires_grad else output.detach().requires_grad_().clone()
        outputs = output.detach().movedim(sample_axis, 0).clone()

        def add(gradient: Tensor) -> None:
            moved = gradient.movedim(sample_axis, 0)
            values, slope = (
                as_computed(by_sample(name, tensor, module, samples)) for tensor in (outputs, moved)
            )
            for levels, change in changes:
                effects[levels] += change.effects(values, slope).double().cpu()

        tap.register_hook(add)
        return tap

    return made


def _norm_hook(
    changes: Sequence[tuple[slice, NormChange]], sample_axis: int, effects: Tensor
) -> Any:
    """A forward hook of a norm that adds e in the backward pass."""

    def normed(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        tap = output if output.requires_grad else output.detach().requires_grad_().clone()
        inputs = arguments[0].detach().movedim(sample_axis, 0).clone()

        def add(gradient: Tensor) -> None:
            moved = gradient.movedim(sample_axis, 0)
            for levels, change in changes:
                effects[levels] += change.effects(inputs, moved, effects.shape[1]).double().cpu()

        tap.register_hook(add)
        return tap

    return normed
