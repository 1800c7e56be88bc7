"""Hooks that let a model compute as if only its critical neurons were there."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.graph.axes import input_axis


def zeroing_hook(module: nn.Module, channels: Tensor) -> Any:
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


def norm_hook(norm: nn.LayerNorm | nn.GroupNorm, channels: Tensor) -> Any:
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
