"""Calls on tensors without values, for less than torch's own rules for them cost.

On its "meta" device torch finds the shapes of many results in Python, by decompositions that take
up to a millisecond for an operation. Those that models are made of have results whose shapes are
known at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def called(function: Any, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """What an operation gives; without values it costs little where its rule is known here."""
    rule = RULES.get(function)
    if rule is not None and not keywords and _alike(arguments):
        made = rule(arguments)
        if made is not None:
            return made
    return function(*arguments, **keywords)


class ShapesAlone(TorchDispatchMode):
    """Within the context, operations on tensors without values cost little; others are as ever."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        return called(function, arguments, keywords or {})


def _alike(arguments: Sequence[Any]) -> bool:
    """Whether all tensors are without values, of one floating-point type."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    return all(
        type(value) in (Tensor, torch.nn.Parameter)
        and value.device.type == "meta"
        and value.dtype == tensors[0].dtype
        and value.is_floating_point()
        for value in tensors
    )


def _like_first(arguments: Sequence[Any]) -> Tensor:
    return torch.empty_like(arguments[0])


def _first(arguments: Sequence[Any]) -> Tensor:
    """Of an operation in place."""
    found: Tensor = arguments[0]
    return found


def _like_larger(arguments: Sequence[Any]) -> Tensor | None:
    """Of two tensors, of which the second is spread over the first."""
    one, other = arguments[:2]
    if not isinstance(other, Tensor):
        return None
    if other.dim() > one.dim() or any(
        length not in (1, wide)
        for length, wide in zip(other.shape[::-1], one.shape[::-1], strict=False)
    ):
        return None
    return torch.empty_like(one)


def _product(arguments: Sequence[Any]) -> Tensor | None:
    """bias + one @ other, ``[rows, columns]``."""
    bias, one, other = arguments[:3]
    rows, columns = one.shape[0], other.shape[1]
    if one.shape[1] != other.shape[0] or bias.shape != (columns,):
        return None
    return torch.empty((rows, columns), dtype=one.dtype, device="meta")


def _batch_norm(arguments: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    inputs, scale, training = arguments[0], arguments[1], arguments[5]
    if training or (scale is not None and scale.shape != inputs.shape[1:2]):
        return None
    return torch.empty_like(inputs), inputs.new_empty(0), inputs.new_empty(0)


def _layer_norm(arguments: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor] | None:
    inputs, shape = arguments[:2]
    axes = len(shape)
    if tuple(inputs.shape[-axes:]) != tuple(shape):
        return None
    statistics = (*inputs.shape[:-axes], *(1,) * axes)
    made = torch.empty(inputs.shape, dtype=inputs.dtype, device="meta")
    return made, inputs.new_empty(statistics), inputs.new_empty(statistics)


RULES: Mapping[Any, Callable[[Sequence[Any]], Any]] = {
    **dict.fromkeys(
        (
            aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardswish.default,
            aten.hardsigmoid.default, aten.sigmoid.default, aten.tanh.default,
            aten._safe_softmax.default,
        ),
        _like_first,
    ),
    **dict.fromkeys((aten.hardswish_.default, aten.hardsigmoid_.default), _first),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor), _like_larger),
    aten.addmm.default: _product,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _layer_norm,
}  # fmt: skip
"""Operation -> function of its arguments that makes its result, or None where torch must."""
