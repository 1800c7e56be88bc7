"""How a layer's inputs change when the first neurons of an elimination go, level by level.

A level is a number of neurons that go. To first order the loss changes by e = Σ g Δ, the products
of gradients g and changes Δ over the channels and positions of a sample. Here e is computed for all
levels of a group together, at two kinds of places:

- At a consumer, Δ of a channel that goes is what the others explain of it less what it was:
  Δ_P = B (x_S − μ_S) − (x_P − μ_P) with B = Σ_PS Σ_SS⁻¹, see :mod:`nss_prune.allocation.explained`.
- At the output of a norm over the neurons, those that stay are normalised by the statistics of
  fewer channels. For torch's norms this is a closed form, from sums that all levels share; one of
  a user's own is called with the channels that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from nss_prune.allocation.explained import Explained
from nss_prune.core.batches import as_computed
from nss_prune.graph.masking import norm_over
from nss_prune.graph.norms import norm_axis

Norm = nn.LayerNorm | nn.GroupNorm | nn.RMSNorm


@dataclass(frozen=True)
class ConsumerChange:
    """How the input of one consumer changes.

    Units are its channels, or the neurons of a flattened map.

    Attributes:
        order: Units, first those that go at the last level, in the order in which they go,
            ``[units]``.
        gone: How many of them have gone at each level.
        mean: Of each channel, ``[channels]``; None where nothing is folded.
        explained: What the units that stay explain of the others; None where nothing is folded.
    """

    order: Tensor
    gone: tuple[int, ...]
    mean: Tensor | None = None
    explained: Explained | None = None

    @property
    def values(self) -> int:
        """Values that are kept to fold with."""
        return 0 if self.explained is None else self.explained.values

    def effects(self, inputs: Tensor, gradient: Tensor) -> Tensor:
        """e of each level and sample, ``[levels, samples]``.

        Args:
            inputs: ``[samples, channels, positions]``, and so is ``gradient``.
        """
        if self.mean is not None:
            inputs = inputs - self.mean.to(inputs)[:, None]
        most, samples = max(self.gone), len(inputs)
        order = self.order.to(inputs.device)
        values = _by_unit(inputs, len(order), order)
        slope = _by_unit(gradient, len(order), order[:most])
        lost = nn.functional.pad(
            (values[:most] * slope).view(most, samples, -1).sum(2), (0, 0, 1, 0)
        )
        effects = -lost.cumsum(0)[list(self.gone)]
        if self.explained is not None:
            by_place = self.explained.effects(values, slope, self.gone)
            effects += by_place.view(len(self.gone), samples, -1).sum(2)
        return effects


def _by_unit(values: Tensor, units: int, chosen: Tensor) -> Tensor:
    """Some units of ``[samples, channels, positions]``, as memory has them, ``[units, rows]``."""
    by_sample = values.reshape(len(values), units, -1)
    if by_sample.stride(1) == 1:
        return by_sample.movedim(1, 2).flatten(0, 1).index_select(1, chosen).T
    return by_sample.index_select(1, chosen).transpose(0, 1).flatten(1)


def ordered(ranks: Tensor, counts: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Units in the order in which they go, and how many have gone at each level.

    Args:
        ranks: When each unit goes, in neurons; -1 for one that is of another group, ``[units]``.
        counts: Neurons that have gone at each level.
    """
    never = int(ranks.max()) + 1
    order = ranks.where(ranks >= 0, never).argsort(stable=True)
    gone = tuple(int(((ranks >= 0) & (ranks < count)).sum()) for count in counts)
    return order, gone


class NormChange(Protocol):
    """How the output of a norm changes in the channels that stay."""

    def effects(self, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
        """e of each level and sample, ``[levels, samples]``.

        Args:
            inputs: Of the norm, and ``gradient`` by its output, of the shape of it.
        """
        ...


def norm_change(norm: nn.Module, kept: Tensor) -> NormChange:
    """In closed form for torch's norms, by calls for others.

    Args:
        kept: True for the channels that stay at each level, ``[levels, channels]``.
    """
    if isinstance(norm, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return KnownNormChange(norm, kept)
    return OwnNormChange(norm, kept)


@dataclass(frozen=True)
class KnownNormChange:
    """Of LayerNorm, GroupNorm or RMSNorm: with z the inputs, m and s their mean and deviation over
    the channels that stay, and m₀ and s₀ over all, Δ = w ((z − m) / s − (z − m₀) / s₀).

    RMSNorm has no means.

    Attributes:
        norm: The whole norm.
        kept: True for the channels that stay at each level, ``[levels, channels]``.
    """

    norm: Norm
    kept: Tensor

    def effects(self, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
        """See :class:`NormChange`."""
        values, slope = self._arranged(as_computed(inputs)), self._arranged(as_computed(gradient))
        weight = self.norm.weight
        if weight is not None:
            slope = slope * as_computed(weight).view(1, *values.shape[1:3], 1)
        centres = not isinstance(self.norm, nn.RMSNorm)
        if centres:
            values = values - values.mean((2, 3), keepdim=True)
        sums = torch.stack([values, values.square(), slope * values, slope]).sum(4)
        kept = self.kept.to(sums).view(len(self.kept), *values.shape[1:3])
        channels = kept.sum(2)[:, None]
        shift, square, first, second = torch.einsum("lgc,zrgc->zlrg", kept, sums)
        count = (channels * values.shape[3]).clamp(min=1)
        shift, square = (shift / count if centres else torch.zeros_like(shift)), square / count
        epsilon = self._epsilon(inputs)
        before = (values.square().mean((2, 3)) + epsilon).rsqrt()
        after = ((square - shift.square()).clamp(min=0) + epsilon).rsqrt()
        effects = first * (after - before) - second * shift * after
        by_row: Tensor = effects.sum(2)
        return by_row.view(len(kept), samples, -1).sum(2)

    def _epsilon(self, inputs: Tensor) -> float:
        return torch.finfo(inputs.dtype).eps if self.norm.eps is None else self.norm.eps

    def _arranged(self, values: Tensor) -> Tensor:
        """``[rows, channel groups, channels, positions]``; a row is normalised by itself."""
        if isinstance(self.norm, nn.GroupNorm):
            groups = self.norm.num_groups
            return values.reshape(len(values), groups, values.shape[1] // groups, -1)
        width = self.norm.normalized_shape[-1]
        last = values.movedim(norm_axis(self.norm, width, values.shape), -1)
        return last.reshape(-1, 1, width, 1)


@dataclass(frozen=True)
class OwnNormChange:
    """Of a norm of a user's own, which is called with the channels that stay at each level.

    Attributes:
        norm: The whole norm.
        kept: True for the channels that stay at each level, ``[levels, channels]``.
    """

    norm: nn.Module
    kept: Tensor

    @torch.no_grad()
    def effects(self, inputs: Tensor, gradient: Tensor, samples: int) -> Tensor:
        """See :class:`NormChange`."""
        axis = norm_axis(self.norm, self.kept.shape[1], inputs.shape)
        whole = self.norm.forward(inputs)
        found = []
        for kept in self.kept:
            where = kept.nonzero().flatten().to(inputs.device)
            alone = norm_over(self.norm, where)(inputs.index_select(axis, where))
            change = as_computed(alone) - as_computed(whole.index_select(axis, where))
            effect = change * as_computed(gradient.index_select(axis, where))
            found.append(effect.reshape(samples, -1).sum(1))
        return torch.stack(found)
