"""What a consumer makes of a constant input, and its weight by channel groups."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.graph.axes import input_axis


@dataclass(frozen=True)
class ConstantOutput:
    """What a consumer makes of a constant map, over its positions.

    Attributes:
        average: ``[outputs]``.
        power: Mean square, summed over the outputs.
        uneven: Variance over the positions, summed over the outputs: 0 but where it pads with
            zeros or is transposed with a stride.
    """

    average: Tensor
    power: float
    uneven: float


def constant_output(module: nn.Module, shape: Sequence[int], means: Tensor) -> ConstantOutput:
    """What a consumer without its bias makes of ``means``, ``[units, repeats]``."""
    weight: Any = module.weight
    inputs = constant_map(module, shape, means.flatten())
    outputs = response(module, weight.detach().double(), inputs)
    average = outputs.mean(1)
    uneven = float((outputs - average[:, None]).square().mean(1).sum())
    return ConstantOutput(average, float(outputs.square().mean(1).sum()), uneven)


def constant_map(module: nn.Module, shape: Sequence[int], values: Tensor) -> Tensor:
    """``[1, channels]``, or ``[1, channels, ...]`` of the size of ``shape``."""
    if input_axis(module) != 1:
        return values[None]
    sizes = shape[1:]
    return values.view(1, -1, *[1] * len(sizes)).expand(1, -1, *sizes)


def response(module: nn.Module, weight: Tensor, inputs: Tensor) -> Tensor:
    """What a module with another weight and no bias makes of a sample, ``[outputs, positions]``."""
    clone = copy.copy(module)
    others = {
        name: None if value is None else value.detach().double()
        for name, value in module._parameters.items()
        if name not in ("weight", "bias")
    }
    parameters: dict[str, Any] = {**others, "weight": weight, "bias": None}
    clone._parameters = parameters
    clone.training = False
    with torch.no_grad():
        outputs: Tensor = clone.forward(inputs)
    return outputs[0].reshape(outputs.shape[1], -1)


def by_channel_group(module: nn.Module, repeats: int) -> Tensor:
    """The weight as float64 ``[channel groups, outputs, units, kernel positions]``.

    A linear layer over a flattened map is a convolution whose kernel is as large as the map.
    """
    weight: Tensor = module.weight.detach().double()  # type: ignore[operator, union-attr]
    if not isinstance(module, nn.modules.conv._ConvNd):
        return weight.reshape(1, len(weight), -1, repeats)
    by_group = weight.reshape(module.groups, -1, weight.shape[1], weight[0, 0].numel())
    return by_group.transpose(1, 2) if module.transposed else by_group


def as_weight(by_group: Tensor, module: nn.Module) -> Tensor:
    """What :func:`by_channel_group` made, in the shape that the module has."""
    weight: Any = module.weight
    is_transposed = isinstance(module, nn.modules.conv._ConvNd) and module.transposed
    ordered = by_group.transpose(1, 2) if is_transposed else by_group
    return ordered.reshape(weight.shape)
