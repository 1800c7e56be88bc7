"""The divergence that sparing neurons of a layer causes, measured.

Sparing k neurons of a layer and folding them into those that stay changes the weights of their
readers by Δ(k). To first order the scores z then move by JΔ, and to second order the outputs
diverge by

    D(k) ≈ ½ E[e(k)²],    e(k) = vᵀ J Δ(k),

where v is drawn with covariance diag(p) − p pᵀ: the Fisher information of the change itself. Unlike
the sum over positions and readers that :mod:`nss_prune.allocation.divergence` foresees, what
several readers of the same neurons do in the same direction adds up before it is squared, and so
does what neighbouring positions of a map do; and Δ is what the fold really is. The e of a few
numbers of neurons come from one pass, forward and backward; between these, what is more than
predicted is interpolated. Where less is measured than predicted, D is as predicted: what cancels
over the positions of a map, or in the samples at hand, need not cancel when other layers change
too.

A norm over the neurons of a layer, as on the trunk of a transformer, normalises what stays by other
statistics when some go, which no change of its readers says. There D is the divergence of the
outputs themselves, with the layer masked and folded, in a forward pass for each number of neurons.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nss_prune.allocation.elimination import Elimination
from nss_prune.compensation.folding import apply, folding
from nss_prune.compensation.solve import ConsumerFold
from nss_prune.core.arguments import on_input
from nss_prune.core.batches import as_computed, counted_batches, split_batch
from nss_prune.core.models import evaluation, run, submodule
from nss_prune.core.nested import tensors_in
from nss_prune.core.outputs import class_scores, drawn_loss, scores_by_place
from nss_prune.graph.axes import input_axis
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.norms import norm_of
from nss_prune.graph.slices import Slice
from nss_prune.statistics.moments import ConsumerStatistics

LEVELS = 8  # numbers of neurons of a layer that are measured, evenly spaced
LEAST_SAMPLES = 100  # an average of fewer squares is mostly noise
MOST_SAMPLES = 2000  # more of them cost time and change little
MOST_VALUES = 2**27  # of folds that are kept at once, 1 GiB


def measured(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    found: Mapping[str, Elimination],
    statistics: Mapping[str, ConsumerStatistics] | None,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Elimination]:
    """Eliminations with at least the divergence measured, on at most :data:`MOST_SAMPLES` samples.

    It takes a forward and a backward pass, and another one for every :data:`MOST_VALUES` values
    that the folds mix with; and :data:`LEVELS` forward passes for each layer with a norm over its
    neurons. The model is left as found.

    Args:
        data: Batches that can be iterated again.
        found: As :func:`nss_prune.allocation.sensitivity.eliminations` finds them.
        statistics: What the readers read, to fold with; None where nothing is folded.
        seed: For what is drawn at random.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        What was found where there are fewer than :data:`LEAST_SAMPLES` samples.

    Raises:
        DataError: The data is empty, or the model refuses it or gives no class scores.
    """
    counts = {group.name: _counts(group.size) for group in groups if group.name in found}
    counts = {name: levels for name, levels in counts.items() if len(levels)}
    known = dict(found)
    if not counts or not _suffices(data):
        return known
    normed = {name: counts.pop(name) for name in _normed(model, groups) if name in counts}
    if normed:
        slices = itertools.chain.from_iterable(
            _slices(groups, name, found[name].order.cpu(), levels)
            for name, levels in normed.items()
        )
        divergences = _divergences(model, data, slices, statistics, progress)
        by_layer = divergences.split([len(levels) for levels in normed.values()])
        for (name, levels), divergence in zip(normed.items(), by_layer, strict=True):
            known[name] = _scaled(found[name], levels, divergence)
    for changes in _parts(model, groups, found, counts, statistics):
        squares = changes.effects(data, seed, progress).square().mean(0) / 2
        by_layer = squares.split([len(counts[name]) for name in changes.layers])
        for name, divergence in zip(changes.layers, by_layer, strict=True):
            known[name] = _scaled(found[name], counts[name], divergence)
    return known


def _scaled(found: Elimination, counts: Tensor, measured: Tensor) -> Elimination:
    """An elimination whose D is at least what was measured after some numbers of neurons.

    Args:
        counts: Those numbers, ascending, ``[levels]``.
        measured: D on the samples that the readers were folded with, ``[levels]``.
    """
    predicted = found.divergence.cpu()
    growth = torch.ones_like(predicted) if found.growth is None else found.growth.cpu()
    excess = (measured * growth[counts - 1] ** 2 - predicted[counts - 1]).clamp(min=0)
    more = np.interp(np.arange(1, len(predicted) + 1), [0, *counts.tolist()], [0, *excess.tolist()])
    curve = (predicted + torch.from_numpy(more)).cummax(0).values
    return replace(found, divergence=curve.to(found.divergence))


def _suffices(data: Iterable[Any]) -> bool:
    """Whether there are enough samples."""
    batches = (tensors_in(split_batch(batch)[0]) for batch in data)
    samples = itertools.accumulate(len(tensors[0]) if tensors else 0 for tensors in batches)
    return any(seen >= LEAST_SAMPLES for seen in samples)


def _normed(model: nn.Module, groups: Sequence[NeuronGroup]) -> list[str]:
    """Layers with a norm over their neurons."""
    return [
        group.name
        for group in groups
        if any(norm_of(member, model) is not None for member in group.members)
    ]


def _divergences(
    model: nn.Module,
    data: Iterable[Any],
    slices: Iterable[Slice],
    statistics: Mapping[str, ConsumerStatistics] | None,
    progress: bool | None,
) -> Tensor:
    """D of the outputs with each slice masked and folded, float64 ``[slices]``."""
    whole, samples = _answers(model, data, progress)
    found = []
    for critical in slices:
        folded = copy.deepcopy(model)
        if statistics is not None:
            apply(folded, folding(model, critical, statistics))
        with critical.masked(folded):
            answers, _ = _answers(folded, data, progress)
        found.append((whole.exp() * (whole - answers)).sum().double().cpu() / samples)
    return torch.stack(found)


@torch.no_grad()
def _answers(model: nn.Module, data: Iterable[Any], progress: bool | None) -> tuple[Tensor, int]:
    """Logarithms of probabilities, ``[places, classes]``, and the number of samples."""
    answers: list[Tensor] = []
    seen = 0
    with evaluation(model):
        for scores, samples in scores_by_place(model, data, progress, "divergence"):
            answers.append(scores.log_softmax(1))
            seen += samples
            if seen >= MOST_SAMPLES or sum(a.numel() for a in answers) >= MOST_VALUES:
                break
    return torch.cat(answers), seen


def _counts(size: int) -> Tensor:
    """Numbers of neurons that go, up to all but one."""
    counts: Tensor = torch.linspace(0, size - 1, LEVELS + 1).round().long().unique()
    return counts[1:]


def _parts(
    model: nn.Module,
    groups: Sequence[NeuronGroup],
    found: Mapping[str, Elimination],
    counts: Mapping[str, Tensor],
    statistics: Mapping[str, ConsumerStatistics] | None,
) -> Iterator[_Changes]:
    """The changes of all layers, in parts that may be kept at once, a layer at least."""
    part = _Changes(model)
    for name, numbers in counts.items():
        part.add(name, _slices(groups, name, found[name].order.cpu(), numbers), statistics)
        if part.values >= MOST_VALUES:
            yield part
            part = _Changes(model)
    if part.layers:
        yield part


def _slices(
    groups: Sequence[NeuronGroup], name: str, order: Tensor, counts: Tensor
) -> Iterator[Slice]:
    """Slices that lack the first so many neurons of a layer, and no others."""
    every = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    for count in counts.tolist():
        kept = every[name].index_fill(0, order[:count], False)
        yield Slice({**every, name: kept}, tuple(groups))


class _Changes:
    """How readers change when neurons of single layers go, and what that does to the scores.

    Attributes:
        layers: In the order added.
        values: That the folds mix with.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: list[str] = []
        self.levels = self.values = 0
        self.by_reader: dict[str, list[tuple[int, _Change]]] = {}
        self.sample_axes: dict[str, int] = {}

    def add(
        self,
        layer: str,
        slices: Iterable[Slice],
        statistics: Mapping[str, ConsumerStatistics] | None,
    ) -> None:
        """Add a layer, a level for each slice."""
        self.layers.append(layer)
        for critical in slices:
            folds = {} if statistics is None else folding(self.model, critical, statistics)
            for (name, side), (member, channels) in critical.removed_channels().items():
                if side == "in" and member.axis is None:
                    change = _change(folds.get(name, ConsumerFold()), channels, member.width)
                    self.by_reader.setdefault(name, []).append((self.levels, change))
                    self.sample_axes[name] = member.sample_axis
                    self.values += sum(block.mixing.numel() for block in change.blocks)
            self.levels += 1

    def effects(self, data: Iterable[Any], seed: int, progress: bool | None) -> Tensor:
        """e of every level for each sample, float64 ``[samples, levels]``."""
        generator = torch.Generator().manual_seed(seed)
        found: list[Tensor] = []
        with evaluation(self.model), torch.enable_grad():
            for number, inputs, samples in counted_batches(
                self.model, data, progress, "divergence"
            ):
                found.append(torch.zeros(samples, self.levels, dtype=torch.float64))
                with self._watched(found[-1]):
                    scores = class_scores(run(self.model, inputs, number)).float()
                    drawn_loss(scores, generator).backward()
                if sum(map(len, found)) >= MOST_SAMPLES:
                    break
        effects: Tensor = torch.cat(found)
        return effects

    @contextlib.contextmanager
    def _watched(self, effects: Tensor) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, changes in self.by_reader.items():
                module = submodule(self.model, name)
                axis = input_axis(module)
                samples_at = self.sample_axes[name]
                read = _input_hook(changes, axis, samples_at, effects)
                stack.callback(on_input(module, read).remove)
                constants = {level: c.constant for level, c in changes if c.constant is not None}
                if constants:
                    written = _output_hook(constants, axis, samples_at, effects)
                    stack.callback(module.register_forward_hook(written).remove)
            yield


@dataclass(frozen=True)
class _Block:
    """What a reader reads otherwise in one of its channel groups.

    Units are channels, or the neurons of a flattened map, of all channel groups together.

    Attributes:
        gone: Units that are not read any more.
        staying: Units that are read more in their place.
        mixing: How much of them, ``[gone, staying]``.
    """

    gone: Tensor
    staying: Tensor
    mixing: Tensor

    def moved(self, inputs: Tensor) -> Tensor:
        """What the units that go are replaced by less what they were, ``[gone, values]``.

        Args:
            inputs: ``[units, values]``.
        """
        device = inputs.device
        said = self.mixing.to(inputs) @ inputs[self.staying.to(device)]
        return said.sub_(inputs[self.gone.to(device)])


@dataclass(frozen=True)
class _Change:
    """How a reader changes when channels of its input go.

    Attributes:
        units: How many it reads.
        blocks: Of its channel groups that change.
        constant: What is added to its output, ``[outputs]``, or None.
    """

    units: int
    blocks: tuple[_Block, ...]
    constant: Tensor | None

    def effect(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """Σ gradient · change over the channels; all are ``[channels, places]`` or ``[places]``."""
        places = inputs.shape[1]
        by_unit, slope = inputs.view(self.units, -1), gradient.view(self.units, -1)
        total = inputs.new_zeros(by_unit.shape[1])
        for block in self.blocks:
            total += (slope[block.gone.to(slope.device)] * block.moved(by_unit)).sum(0)
        return total.view(-1, places).sum(0)


def _change(fold: ConsumerFold, channels: Tensor, width: int) -> _Change:
    """How a reader of ``width`` channels changes when ``channels`` go."""
    if fold.mixing is None:
        block = _Block(channels, channels[:0], torch.zeros(len(channels), 0))
        return _Change(width, (block,), fold.constant)
    groups, units, _ = fold.mixing.shape
    gone = torch.zeros(groups * units, dtype=torch.bool)
    gone[channels * groups * units // width] = True
    blocks = []
    for group, out in enumerate(gone.view(groups, units)):
        lost, staying = out.nonzero().flatten(), (~out).nonzero().flatten()
        mixing = fold.mixing[group].cpu()[lost][:, staying]
        blocks.append(_Block(lost + group * units, staying + group * units, mixing))
    return _Change(groups * units, tuple(blocks), fold.constant)


def _input_hook(
    changes: Sequence[tuple[int, _Change]], axis: int, samples_at: int, effects: Tensor
) -> Any:
    """For the inputs of a reader: what its changes do is added up in the backward pass."""

    def read(module: nn.Module, given: Tensor) -> Tensor:
        # A copy: what follows may write to the original, and the gradient is this reader's alone.
        tap = given.clone()
        inputs = _by_channel(tap.detach().movedim(samples_at, 0), axis)
        if not tap.requires_grad:
            tap.requires_grad_()

        def add(gradient: Tensor) -> None:
            slope = _by_channel(gradient.movedim(samples_at, 0), axis)
            for level, change in changes:
                _add(effects, level, change.effect(inputs, slope))

        tap.register_hook(add)
        return tap

    return read


def _output_hook(
    constants: Mapping[int, Tensor], axis: int, samples_at: int, effects: Tensor
) -> Any:
    """A forward hook of a reader: the same for the constants added to its output.

    Args:
        constants: Level -> constant, ``[outputs]``.
    """

    def written(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            slope = _by_channel(gradient.movedim(samples_at, 0), axis)
            for level, constant in constants.items():
                _add(effects, level, constant.to(slope) @ slope)

        output.register_hook(add)

    return written


def _by_channel(values: Tensor, axis: int) -> Tensor:
    """``[channels, places]``, the places of a sample one after the other."""
    return as_computed(values).movedim(axis, 0).flatten(1).contiguous()


def _add(effects: Tensor, level: int, by_place: Tensor) -> None:
    effects[:, level] += by_place.view(len(effects), -1).sum(1).double().cpu()
