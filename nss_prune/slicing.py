"""Profile + θ -> Slice: which neurons are critical."""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nss_prune.errors import ArgumentError, ModelMismatchError
from nss_prune.files import read_file, write_file
from nss_prune.layout import decode_groups, encode_groups
from nss_prune.neurons import (
    Member,
    NeuronGroup,
    check_fits,
    input_axis,
    parameter_axes,
    submodule,
)
from nss_prune.similarity import ranked

if TYPE_CHECKING:
    from nss_prune.profile import Profile

KIND = "nss_prune slice"

Strategy = Literal["semantic", "category", "global"]
STRATEGIES = ("semantic", "category", "global")


@dataclass(frozen=True)
class Slice:
    """The critical neurons of a model.

    Attributes:
        kept: Layer -> True where a neuron is critical, bool ``[neurons]``.
        groups: The neuron groups that the layers' names stand for.
    """

    kept: dict[str, Tensor]
    groups: tuple[NeuronGroup, ...]

    def __post_init__(self) -> None:
        sizes = {group.name: group.size for group in self.groups}
        for name, kept in self.kept.items():
            if name not in sizes or kept.shape != (sizes[name],) or kept.dtype != torch.bool:
                raise ModelMismatchError(
                    f"kept[{name!r}] is {kept.dtype} {tuple(kept.shape)}; allowed are bool masks "
                    f"over {sizes}"
                )
            if not kept.any():
                raise ArgumentError(f"kept[{name!r}] keeps no neuron; keep at least one")

    @property
    def removed(self) -> dict[str, Tensor]:
        """Layer -> indices of the neurons that are not critical, where there are any."""
        return {
            name: (~kept).nonzero().flatten() for name, kept in self.kept.items() if not kept.all()
        }

    def removed_channels(self) -> dict[tuple[str, str], tuple[Member, Tensor]]:
        """(module, "out" | "in" | "both") -> a member of that side, and its channels to remove.

        A side may belong to several groups (a concat); their channels are united.
        """
        found: dict[tuple[str, str], tuple[Member, Tensor]] = {}
        for group in self.groups:
            if group.name not in self.kept:
                continue
            gone = ~self.kept[group.name]
            for member in group.members:
                channels = member.channels[gone[member.neurons]]
                key = (member.name, member.side)
                if key in found:
                    channels = torch.cat([found[key][1], channels])
                found[key] = (member, channels)
        return {
            key: (member, channels.sort().values)
            for key, (member, channels) in found.items()
            if len(channels)
        }

    @contextlib.contextmanager
    def masked(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context, the critical neurons are all that ``model`` has.

        What reads a neuron that is not critical reads zero, and a norm over the neurons sees the
        critical ones only, so outputs equal those of the physically smaller model.

        Raises:
            ModelMismatchError: ``model`` has other layers or widths than the profiled one.
        """
        check_fits(self.groups, model)
        with contextlib.ExitStack() as stack:
            for (name, side), (member, channels) in self.removed_channels().items():
                if member.axis is not None:
                    continue
                module = submodule(model, name)
                if side == "in":
                    hook = _zeroing_hook(module, channels)
                    stack.callback(module.register_forward_pre_hook(hook).remove)
                elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                    norm_hook = _norm_hook(module, channels)
                    stack.callback(module.register_forward_hook(norm_hook).remove)
            yield model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the slice as safetensors, one bit a neuron, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        write_file(path, KIND, *encode_slice(self))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Slice:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: The file is damaged, foreign, or of a newer version.
            OSError: The file cannot be read.
        """
        return decode_slice(*read_file(path, KIND))

    def compression_rate(self, model: nn.Module) -> float:
        """Share of the parameters of ``model`` that belong to neurons outside the slice.

        It equals the share that is gone after the physical removal.
        """
        left = parameters_left(self, model)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        return 1 - sum(left.values()) / sum(sizes.values())


def encode_slice(critical: Slice) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, one bit a neuron, and JSON that refers to them."""
    tensors, groups = encode_groups(critical.groups)
    for name, kept in critical.kept.items():
        tensors[f"kept/{name}"] = torch.from_numpy(np.packbits(kept.cpu().numpy()))
    return tensors, {"groups": groups, "kept": list(critical.kept)}


def decode_slice(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Slice:
    """What :func:`encode_slice` encoded."""
    groups = decode_groups(tensors, notes["groups"])
    sizes = {group.name: group.size for group in groups}
    kept = {
        name: torch.from_numpy(
            np.unpackbits(tensors[f"kept/{name}"].numpy(), count=sizes[name])
        ).bool()
        for name in notes["kept"]
    }
    return Slice(kept, groups)


def parameters_left(critical: Slice, model: nn.Module) -> dict[str, int]:
    """Parameter -> number of its entries after the removal.

    Raises:
        ModelMismatchError: The model does not have the layers of the slice.
    """
    return ParameterCount(critical.groups, model).left(critical)


class ParameterCount:
    """What slices leave of the parameters of a model, without a look at it for each.

    Raises:
        ModelMismatchError: The model does not have the layers of the groups.

    Attributes:
        shapes: Parameter -> its shape.
    """

    def __init__(self, groups: Sequence[NeuronGroup], model: nn.Module) -> None:
        check_fits(groups, model)
        self.shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        self._shrinking: dict[str, set[int]] = {}
        self._members: dict[tuple[str, int], list[tuple[str, Member, int | None]]] = {}
        first_names = _first_names(model)
        for group in groups:
            for member in group.members:
                entry = (group.name, member, _repeats(member, group.size))
                for name, axis in _axes_of(member, model):
                    parameter = first_names[name]
                    axis %= len(self.shapes[parameter])
                    self._shrinking.setdefault(parameter, set()).add(axis)
                    known = self._members.setdefault((parameter, axis), [])
                    # A layer that the model holds under two names shrinks once.
                    if not known or known[0][1].name == member.name:
                        known.append(entry)

    def left(self, critical: Slice) -> dict[str, int]:
        """Parameter -> number of its entries after the removal of all outside a slice."""
        gone = {name: ~kept for name, kept in critical.kept.items()}
        counts = {name: int(mask.sum()) for name, mask in gone.items()}
        left = {name: math.prod(shape) for name, shape in self.shapes.items()}
        for parameter, axes in self._shrinking.items():
            shape = list(self.shapes[parameter])
            for axis in axes:
                share = 0.0
                for name, member, repeats in self._members[parameter, axis]:
                    if not counts.get(name):
                        continue
                    if repeats is None:
                        share += int(gone[name][member.neurons].sum()) / member.width
                    else:
                        share += counts[name] * repeats / member.width
                if shape[axis] > 1:
                    shape[axis] -= round(shape[axis] * share)
            left[parameter] = math.prod(shape)
        return left


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first one."""
    first = {id(value): name for name, value in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in everything}


def _repeats(member: Member, size: int) -> int | None:
    """How often each neuron of a group comes on a side, where that is the same for all."""
    counts = torch.bincount(member.neurons, minlength=size)
    return int(counts[0]) if bool((counts == counts[0]).all()) else None


def _axes_of(member: Member, model: nn.Module) -> Iterator[tuple[str, int]]:
    """The parameters, and the axis of each, that shrink with a member."""
    if member.axis is not None:
        yield member.name, member.axis
        return
    for parameter, (made, read) in parameter_axes(submodule(model, member.name)).items():
        axis = read if member.side == "in" else made
        if axis is not None:
            yield f"{member.name}.{parameter}" if member.name else parameter, axis


def _zeroing_hook(module: nn.Module, channels: Tensor) -> Any:
    def zero(reader: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = arguments[0]
        axis = input_axis(module)
        width = inputs.shape[axis]
        shape = [1] * inputs.dim()
        shape[axis] = width
        mask = torch.ones(width, dtype=torch.bool, device=inputs.device)
        mask[channels.to(inputs.device)] = False
        # Not a product: a removed neuron that is infinite or NaN must vanish too.
        zeroed = torch.where(mask.view(shape), inputs, inputs.new_zeros(()))
        return (zeroed, *arguments[1:])

    return zero


def _norm_hook(norm: nn.LayerNorm | nn.GroupNorm, channels: Tensor) -> Any:
    grouped = isinstance(norm, nn.GroupNorm)
    width = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[-1]
    kept = torch.ones(width, dtype=torch.bool)
    kept[channels] = False
    positions = kept.nonzero().flatten()

    def normalize(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        small = copy.copy(norm)
        small._parameters = {
            key: None if value is None else nn.Parameter(value[positions.to(value.device)])
            for key, value in norm._parameters.items()
        }
        if isinstance(small, nn.GroupNorm):
            small.num_channels = len(positions)
        else:
            small.normalized_shape = (len(positions),)
        small._forward_hooks = type(norm._forward_hooks)()
        where = positions.to(output.device)
        axis = 1 if grouped or arguments[0].shape[-1] != width else -1
        normalized = small(arguments[0].index_select(axis, where))
        return torch.zeros_like(output).index_copy(axis, where, normalized)

    return normalize


def slice_profile(
    profile: Profile,
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
        return Slice({name: entry < theta for name, entry in lowest.items()}, profile.groups)
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
    kept = {name: top_share(values, ratio).any(0) for name, values in scores.items()}
    return Slice(kept, profile.groups)


def top_share(scores: Tensor, ratio: float) -> Tensor:
    """True for the best ``ratio`` of the last axis, at least one; ties by position."""
    count = max(1, round(ratio * scores.shape[-1]))
    best = ranked(scores)[..., :count]
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
