"""Nested tensors: inputs and outputs of any structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested output or batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest with ``function`` of every tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    return value


def add_nested(first: Any, second: Any) -> Any:
    """The sum of two nests of tensors of the same structure."""
    others = iter(tensors_in(second))
    return map_tensors(lambda tensor: tensor + next(others), first)
