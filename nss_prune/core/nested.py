"""Nested tensors: inputs and outputs of any structure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

Path = tuple[Any, ...]
"""The keys, positions and names of fields that lead to a tensor of a nest."""


def items_in(value: Any) -> list[tuple[Any, Any]]:
    """(key, item) of a mapping, a sequence, a dataclass or an object with ``logits``, else none."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    scores = None if isinstance(value, Tensor) else getattr(value, "logits", None)
    return [("logits", scores)] if isinstance(scores, Tensor) else []


def tensors_by_path(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors of a nest, in order, each with the path that leads to it."""
    if isinstance(value, Tensor):
        yield path, value
    for key, item in items_in(value):
        yield from tensors_by_path(item, (*path, key))


def at_path(value: Any, path: Path) -> Any:
    """The item of a nest that a path leads to; None where there is none."""
    for key in path:
        value = dict(items_in(value)).get(key)
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested output or batch, in order."""
    return [tensor for _, tensor in tensors_by_path(value)]


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
