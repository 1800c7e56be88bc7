"""A forward and a backward pass that measures the effects of removals in several groups at once.

The effect of a removal on a sample is e = Σ g Δ over all inputs of the consumers, where Δ is by how
much an input changes and g the gradient by it, of a loss drawn from the model's own outputs. What
it tells is in :mod:`nss_prune.allocation.effects`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.allocation.changes import ConsumerChange, NormChange
from nss_prune.core.arguments import on_input
from nss_prune.core.batches import as_computed, counted_batches
from nss_prune.core.draws import Draws
from nss_prune.core.models import Forward, device_of, evaluation, run, submodule
from nss_prune.core.multihead import heads_called
from nss_prune.core.outputs import Outputs
from nss_prune.core.processes import processes, summed
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.statistics.capture import by_sample


class EffectsPass:
    """Groups that are measured in the same pass.

    Args:
        model: It is left as found.
        samples: After so many, over all processes, no more batches are used.

    Attributes:
        layers: In the order added.
        by_channel: Those whose neurons have several channels each, which are folded one by one.
        values: That the folds mix with.
    """

    def __init__(self, model: nn.Module, samples: int) -> None:
        self.model = model
        self.samples = samples
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
            self.sample_axes.setdefault(name, 0)
        for name, change in queries.items():
            self.queries.setdefault(name, []).append((where, change))
        if group.queries is not None:
            self.sample_axes[group.queries.name] = group.queries.sample_axis
        self.layers.append(group.name)
        if not group.has_channels and any(change.explained for change in consumers.values()):
            self.by_channel.add(group.name)
        self.levels = where.stop

    def products_of_effects(
        self,
        data: Iterable[Any],
        seed: int,
        outputs: Outputs,
        forward: Forward,
        progress: bool | None,
    ) -> tuple[Tensor, Tensor]:
        """Mean of e eᵀ over the samples, and the standard errors of the means of e².

        Both are float64, ``[levels, levels]`` and ``[levels]``.
        """
        total = torch.zeros(self.levels, self.levels, dtype=torch.float64)
        fourth = torch.zeros(self.levels, dtype=torch.float64)
        seen = 0
        with evaluation(self.model), torch.enable_grad():
            for number, inputs, samples in counted_batches(self.model, data, progress, "effects"):
                effects = torch.zeros(self.levels, samples, dtype=torch.float64)
                with self._watched(effects):
                    given = run(self.model, inputs, number, forward)
                    outputs.drawn_loss(given, Draws(inputs, seed)).backward()
                total += effects @ effects.T
                fourth += effects.pow(4).sum(1)
                seen += samples
                if seen >= self.samples / processes():
                    break
        counts = torch.tensor([float(seen)], dtype=torch.float64)
        sums = [part.to(device_of(self.model)) for part in (total, fourth, counts)]
        summed(sums)
        products, fourth, counts = (part.cpu() for part in sums)
        products = products / counts
        variances = fourth / counts - products.diagonal().square()
        return products, (variances.clamp(min=0) / counts).sqrt()

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
