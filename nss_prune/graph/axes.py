"""Which axes of modules and parameters carry channels, and how wide they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune.core.models import submodule
from nss_prune.errors import ModelMismatchError
from nss_prune.graph.neurons import Member, NeuronGroup, Side
from nss_prune.graph.recurrent import directions, reads_inputs


def side_width(target: nn.Module | nn.Parameter, side: Side, axis: int | None) -> int | None:
    """Channels on one side of a module or along an axis of a parameter.

    None where the module takes any number of channels.
    """
    if isinstance(target, nn.Parameter):
        assert axis is not None
        return int(target.shape[axis])
    if isinstance(target, nn.RNNBase):
        return target.input_size if side == "in" else directions(target) * target.hidden_size
    if isinstance(target, nn.RNNCellBase):
        return target.input_size if side == "in" else target.hidden_size
    functions = tp.pruner.function.PrunerBox.get(tp.ops.module2type(target))
    if functions is None:
        return None
    functions.pruning_dim = -1
    count = functions.get_in_channels if side == "in" else functions.get_out_channels
    width = count(target)
    return None if width is None else int(width)


def check_fits(groups: Iterable[NeuronGroup], model: nn.Module) -> None:
    """Raise ModelMismatchError unless ``model`` has the layers of the groups, at their widths."""
    parameters = dict(model.named_parameters())
    for group in groups:
        for member in group.members:
            if member.axis is None:
                width = side_width(submodule(model, member.name), member.side, None)
                if width is None and member.side == "both":
                    continue  # a customized layer, of which the caller's functions know
            else:
                found = parameters.get(member.name)
                width = None if found is None else int(found.shape[member.axis])
            if width != member.width:
                raise ModelMismatchError(
                    f"{member.name} has {width} channels ({member.side} side), {member.width} "
                    "were profiled; use the model that was profiled, or a copy of the same "
                    "structure, before anything was removed"
                )


def input_axis(module: nn.Module) -> int:
    """The axis of a consumer's input that carries its channels."""
    return 1 if isinstance(module, nn.modules.conv._ConvNd) else -1


def held_channels(channels: Tensor, width: int) -> Tensor:
    """Those of a consumer's channels that its weight holds, of ``width`` along that axis.

    A grouped convolution loses the same channels in each group, and holds one's.
    """
    return channels[channels < width]


def is_depthwise(convolution: nn.modules.conv._ConvNd) -> bool:
    return 1 < convolution.groups == convolution.in_channels == convolution.out_channels


def parameter_axes(module: nn.Module) -> dict[str, tuple[int, int | None]]:
    """Parameter -> (axis of the channels it makes, axis of the channels it reads or None)."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    if isinstance(module, nn.RNNBase):
        return {name: (0, 1 if reads_inputs(name) else None) for name in names}
    if isinstance(module, nn.Linear):
        return {name: (0, 1 if name == "weight" else None) for name in names}
    if isinstance(module, nn.modules.conv._ConvNd) and not is_depthwise(module):
        weight = (1, 0) if module.transposed else (0, 1)
        return {name: weight if name == "weight" else (0, None) for name in names}
    if isinstance(module, (nn.LayerNorm, nn.Embedding)):
        return dict.fromkeys(names, (-1, None))
    return dict.fromkeys(names, (0, None))


def sides_by_consumer(groups: Sequence[NeuronGroup]) -> dict[str, list[Member]]:
    """Consumer -> its sides, one for each group that it reads."""
    found: dict[str, list[Member]] = {}
    for group in groups:
        for member in group.consumers:
            # The channels of a head have nothing in common, as the positions of a map have.
            side = member if group.has_channels else replace(member, neurons=member.channels)
            found.setdefault(member.name, []).append(side)
    return found


def map_positions(module: nn.Module, members: Sequence[Member]) -> int:
    """Positions of the flattened map that a linear consumer reads neuron by neuron, or 1."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 1
    repeats = len(members[0].neurons) // len(members[0].neurons.unique())
    return repeats if all(_is_flattened(member, repeats) for member in members) else 1


def _is_flattened(member: Member, repeats: int) -> bool:
    """Whether the channels of each neuron are a block of ``repeats`` in a regular layout."""
    if member.width % repeats or len(member.channels) % repeats:
        return False
    blocks, neurons = member.channels.view(-1, repeats), member.neurons.view(-1, repeats)
    return bool(
        (blocks[:, 0] % repeats == 0).all()
        and (blocks - blocks[:, :1] == torch.arange(repeats)).all()
        and (neurons == neurons[:, :1]).all()
    )


def axes_of(member: Member, model: nn.Module) -> Iterator[tuple[str, int]]:
    """The parameters, and the axis of each, that shrink with a member."""
    if member.axis is not None:
        yield member.name, member.axis
        return
    for parameter, (made, read) in parameter_axes(submodule(model, member.name)).items():
        axis = read if member.side == "in" else made
        if axis is not None:
            yield f"{member.name}.{parameter}" if member.name else parameter, axis
