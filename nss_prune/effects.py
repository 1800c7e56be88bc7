"""The divergence that sparing neurons of a layer causes, measured.

Sparing k neurons of a layer and folding them into those that stay changes the weights of their
readers by Δ(k). To first order the scores z then move by JΔ, and to second order the outputs
diverge by

    D(k) ≈ ½ E[e(k)²],    e(k) = vᵀ J Δ(k),

where v is drawn with covariance diag(p) − p pᵀ: the Fisher information of the change itself. Unlike
the sum over positions and readers that :mod:`nss_prune.divergence` foresees, what several readers
of the same neurons do in the same direction adds up before it is squared, and so does what
neighbouring positions of a map do; and Δ is what the fold really is. The e of a few numbers of
neurons come from one pass, forward and backward; between these, what is more than foreseen is
interpolated. Where less is measured than foreseen, D is as foreseen: what cancels over the
positions of a map, or in the samples at hand, need not cancel when other layers change too.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nss_prune.categories import class_scores
from nss_prune.collector import as_computed, run, split_batch
from nss_prune.divergence import Elimination, drawn_loss
from nss_prune.folding import ReaderFold, folding
from nss_prune.neurons import (
    NeuronGroup,
    evaluation,
    held_channels,
    input_axis,
    parameter_axes,
    submodule,
    tensors_in,
)
from nss_prune.readers import ReaderStatistics, counted_batches
from nss_prune.slicing import Slice

LEVELS = 8  # numbers of neurons of a layer that are measured, evenly spaced
LEAST_SAMPLES = 100  # an average of fewer squares is mostly noise
MOST_SAMPLES = 2000  # more of them cost time and change little
MOST_VALUES = 2**28  # weights of changed readers that are kept at once, 1 GiB


def measured(
    model: nn.Module,
    data: Iterable[Any],
    groups: Sequence[NeuronGroup],
    found: Mapping[str, Elimination],
    statistics: Mapping[str, ReaderStatistics] | None,
    *,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Elimination]:
    """Eliminations with at least the divergence measured, on at most :data:`MOST_SAMPLES` samples.

    It takes :data:`LEVELS` times the forward pass of the readers beside a forward and a backward
    pass, and another pass for every :data:`MOST_VALUES` weights that change. The model is left as
    found.

    Args:
        data: Batches that can be iterated again.
        found: As :func:`nss_prune.divergence.eliminations` finds them.
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
    for part in _parts(model, groups, counts):
        changes = _Changes(model, groups, found, part, statistics)
        squares = changes.effects(data, seed, progress).square().mean(0) / 2
        by_layer = squares.split([len(levels) for levels in part.values()])
        for (name, levels), divergence in zip(part.items(), by_layer, strict=True):
            known[name] = _scaled(found[name], levels, divergence)
    return known


def _scaled(found: Elimination, counts: Tensor, measured: Tensor) -> Elimination:
    """An elimination whose D is at least what was measured after some numbers of neurons.

    Args:
        counts: Those numbers, ascending, ``[levels]``.
        measured: D on the samples that the readers were folded with, ``[levels]``.
    """
    foreseen = found.divergence.cpu()
    growth = torch.ones_like(foreseen) if found.growth is None else found.growth.cpu()
    excess = (measured * growth[counts - 1] ** 2 - foreseen[counts - 1]).clamp(min=0)
    more = np.interp(np.arange(1, len(foreseen) + 1), [0, *counts.tolist()], [0, *excess.tolist()])
    curve = (foreseen + torch.from_numpy(more)).cummax(0).values
    return replace(found, divergence=curve.to(found.divergence))


def _suffices(data: Iterable[Any]) -> bool:
    """Whether there are enough samples."""
    batches = (tensors_in(split_batch(batch)[0]) for batch in data)
    samples = itertools.accumulate(len(tensors[0]) if tensors else 0 for tensors in batches)
    return any(seen >= LEAST_SAMPLES for seen in samples)


def _counts(size: int) -> Tensor:
    """Numbers of neurons that go, up to all but one."""
    counts: Tensor = torch.linspace(0, size - 1, LEVELS + 1).round().long().unique()
    return counts[1:]


def _parts(
    model: nn.Module, groups: Sequence[NeuronGroup], counts: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Layers in parts whose changed weights may be kept at once, a layer at least."""
    part: dict[str, Tensor] = {}
    values = 0
    for group in groups:
        if group.name not in counts:
            continue
        readers = {member.name for member in group.readers}
        weights = (getattr(submodule(model, name), "weight", None) for name in readers)
        own = len(counts[group.name]) * sum(w.numel() for w in weights if w is not None)
        if part and values + own > MOST_VALUES:
            yield part
            part, values = {}, 0
        part[group.name] = counts[group.name]
        values += own
    if part:
        yield part


class _Changes:
    """How readers change when neurons of single layers go, and what that does to the scores."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[NeuronGroup],
        found: Mapping[str, Elimination],
        counts: Mapping[str, Tensor],
        statistics: Mapping[str, ReaderStatistics] | None,
    ) -> None:
        self.model = model
        self.levels = 0
        self.by_reader: dict[str, list[tuple[int, _Change]]] = {}
        groups = tuple(groups)
        every = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
        for name, numbers in counts.items():
            order = found[name].order.cpu()
            for number in numbers.tolist():
                kept = every[name].index_fill(0, order[:number], False)
                critical = Slice({**every, name: kept}, groups)
                folds = {} if statistics is None else folding(model, critical, statistics)
                self._add(critical, folds)

    def _add(self, critical: Slice, folds: Mapping[str, ReaderFold]) -> None:
        for (name, side), (member, channels) in critical.removed_channels().items():
            if side == "in" and member.axis is None:
                change = _Change(submodule(self.model, name), folds.get(name), channels)
                self.by_reader.setdefault(name, []).append((self.levels, change))
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
                hook = _hook(changes, effects)
                stack.callback(submodule(self.model, name).register_forward_hook(hook).remove)
            yield


def _hook(changes: Sequence[tuple[int, _Change]], effects: Tensor) -> Any:
    """A forward hook of a reader that adds up what its changes do, in the backward pass."""

    def read(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        # A copy: what follows may write to it.
        inputs = arguments[0].detach().clone()

        def add(gradient: Tensor) -> None:
            with torch.no_grad():
                for level, change in changes:
                    moved = as_computed(gradient) * as_computed(change(inputs))
                    effects[:, level] += moved.reshape(len(effects), -1).sum(1).double().cpu()

        # Not a leaf, which nothing may write to.
        tap = output if output.requires_grad else output.detach().requires_grad_().clone()
        tap.register_hook(add)
        return tap

    return read


class _Change:
    """What the output of a reader moves by when channels of its input go.

    Args:
        fold: How it changes beside; None where it does not.
        channels: Those that go.
    """

    def __init__(self, module: nn.Module, fold: ReaderFold | None, channels: Tensor) -> None:
        self.module = module
        self.channels = channels
        self.constant = None if fold is None else fold.constant
        self.is_plain = _is_plain(module)
        weight = None if fold is None else fold.weight
        if self.is_plain:
            self.twin = _twin(module, weight=self._difference(weight), bias=None)
        else:
            self.twin = module if weight is None else _twin(module, weight=weight)

    def _difference(self, weight: Tensor | None) -> Tensor:
        """What the weight changes by, the columns that go included."""
        old: Any = self.module.weight
        new = (old if weight is None else weight).detach().clone()
        _, axis = parameter_axes(self.module)["weight"]
        assert axis is not None
        new.index_fill_(axis, held_channels(self.channels, new.shape[axis]).to(new.device), 0)
        return new.sub_(old.detach())

    def __call__(self, inputs: Tensor) -> Tensor:
        moved: Tensor
        if self.is_plain:
            moved = self.twin.forward(inputs)
        else:
            axis, channels = input_axis(self.module), self.channels.to(inputs.device)
            without = inputs.index_fill(axis, channels, 0)
            moved = self.twin.forward(without) - self.module.forward(inputs)
        if self.constant is None:
            return moved
        shape = [1] * moved.dim()
        shape[input_axis(self.module)] = -1
        return moved + self.constant.to(moved).view(shape)


def _twin(module: nn.Module, **parameters: Tensor | None) -> nn.Module:
    """The module with other values for some of its parameters."""
    twin = copy.copy(module)
    others: dict[str, Any] = {**module._parameters, **parameters}
    twin._parameters = others
    return twin


def _is_plain(module: nn.Module) -> bool:
    """Whether the output is linear in the weight that the module holds."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return "weight" in module._parameters and any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
    )
