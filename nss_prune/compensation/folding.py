"""Least-squares compensation of removed channels in the layers that consume them.

A consumer that loses its input channels P keeps the channels S. The best linear prediction of what
it misses is x_P ≈ μ_P + B (x_S − μ_S) with B = Σ_PS (Σ_SS + λI)⁻¹, so its weights become
W_S + W_P B and W_P (μ_P − B μ_S) goes into its bias: a closed form, without labels and without
training. Every position of a kernel mixes the channels by the same B, so this holds for
convolutions of any kernel, stride, dilation and padding, transposed ones too, and within the
channel groups of grouped ones. Depthwise convolutions and norms pass neurons on without mixing
them and stay as they are.

Two things are approximate. Where a consumer pads with zeros, or is transposed with a stride, the
constant differs between positions: its average over the output goes into the bias, which is the
best that a bias can do, and the rest counts as error. And the statistics are those of the whole
model: how other folded layers, or a norm over neurons of which some go, change a consumer's
input is seen by :func:`refit` alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nss_prune.compensation.eligible import reason_to_leave, shared_weights
from nss_prune.compensation.problem import missing_channels, resolved
from nss_prune.compensation.solve import ConsumerFold, solved
from nss_prune.core.models import device_of, submodule
from nss_prune.errors import ModelMismatchError
from nss_prune.graph.axes import check_fits, map_positions, sides_by_consumer
from nss_prune.graph.slices import Slice
from nss_prune.statistics.moments import ConsumerStatistics


@dataclass(frozen=True)
class Folded:
    """What was folded.

    Attributes:
        notes: Consumers that were not folded, or only in part, and why.
        errors: Consumer -> E‖Δy‖² / E‖y‖² of its output on the calibration statistics, without
            folding and with it, as in :class:`ConsumerFold`.
    """

    notes: tuple[str, ...]
    errors: dict[str, tuple[float, float]]


def fold(model: nn.Module, critical: Slice, statistics: Mapping[str, ConsumerStatistics]) -> Folded:
    """Fold the neurons outside the slice into their consumers, in place, before they are removed.

    Shapes stay; a consumer that has neither a bias nor a BatchNorm behind it gets a bias. Weights
    and buffers are replaced by new ones and never written to, so that within
    :func:`nss_prune.core.undo.undone_on_error` an error puts the old ones back.

    Args:
        statistics: Of the same model, by
        :func:`nss_prune.statistics.consumers.consumer_statistics`.

    Raises:
        ModelMismatchError: The slice or the statistics are of another model.
    """
    folds = _folds(model, critical, statistics)
    # Without B, which takes as much memory as the statistics.
    return apply(model, {name: replace(found, mixing=None) for name, found in folds})


def folding(
    model: nn.Module, critical: Slice, statistics: Mapping[str, ConsumerStatistics]
) -> dict[str, ConsumerFold]:
    """Consumer -> how it changes, for every consumer that loses channels; nothing is changed.

    λ minimises the error that generalised cross-validation predicts for the consumer's output; see
    :func:`nss_prune.compensation.ridge.ridge`. Where no λ is predicted to do better than the means
    alone, the weights stay. A flattened map is folded channel by channel where there are two
    observations for each kept channel, and otherwise neuron by neuron with the same B at all its
    positions.

    Raises:
        ModelMismatchError: The slice or the statistics are of another model.
    """
    return dict(_folds(model, critical, statistics))


def _folds(
    model: nn.Module, critical: Slice, statistics: Mapping[str, ConsumerStatistics]
) -> Iterator[tuple[str, ConsumerFold]]:
    """:func:`folding`, consumer by consumer."""
    check_fits(critical.groups, model)
    consumers = sides_by_consumer(critical.groups)
    shared = shared_weights(model)
    for (name, side), (member, channels) in critical.removed_channels().items():
        if side != "in" or member.axis is not None:
            continue
        removed = torch.zeros(member.width, dtype=torch.bool)
        removed[channels] = True
        module = submodule(model, name)
        found = statistics[name].to(device_of(model)) if name in statistics else None
        reason = reason_to_leave(module, found, shared)
        if found is None or reason:
            yield name, ConsumerFold(note=f"{name} is left unfolded: {reason}")
            continue
        if len(found.mean) != member.width:
            raise ModelMismatchError(
                f"the statistics of {name} are of {len(found.mean)} channels, it reads "
                f"{member.width}; take them of this model before anything is removed"
            )
        found = resolved(found, map_positions(module, consumers[name]), int((~removed).sum()))
        yield name, solved(name, module, missing_channels(found, removed))


def apply(model: nn.Module, folds: Mapping[str, ConsumerFold]) -> Folded:
    """Change the consumers as :func:`folding` found."""
    for name, change in folds.items():
        module: Any = submodule(model, name)
        if change.weight is not None:
            module.weight = nn.Parameter(change.weight, module.weight.requires_grad)
        if change.constant is None:
            continue
        if module.bias is None and change.norm is not None:
            norm: Any = submodule(model, change.norm)
            norm.running_mean = norm.running_mean - change.constant.to(norm.running_mean)
            continue
        old = module.weight.new_zeros(()) if module.bias is None else module.bias.detach()
        trained = (module.weight if module.bias is None else module.bias).requires_grad
        bias = (old.to(change.constant) + change.constant).to(module.weight)
        module.bias = nn.Parameter(bias, trained)
    return Folded(
        tuple(change.note for change in folds.values() if change.note),
        {name: change.errors for name, change in folds.items() if change.errors is not None},
    )
