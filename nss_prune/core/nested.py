"""Nested tensors: inputs and outputs of any structure.

A nest is a mapping, tuple, list or dataclass, an object with ``logits``, or what libraries register
with torch.utils._pytree, as transformers does its model outputs. All else is a leaf.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

LEAVES = {type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout}
"""Types of leaves that are met often."""

Path = tuple[Any, ...]
"""The keys, positions and names of fields that lead to a tensor of a nest."""


def items_in(value: Any) -> list[tuple[Any, Any]]:
    """(key, item) of a nest, in order; none of a leaf.

    Keys are those of a mapping, names of fields, and positions in all others.
    """
    if isinstance(value, Tensor) or type(value) in LEAVES:
        return []
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (tuple, list)):
        return list(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    if names := _names(value):
        return [(name, getattr(value, name)) for name in names]
    return list(enumerate(_registered_parts(value)))


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
    """All tensors of a nest, in order."""
    return [tensor for _, tensor in tensors_by_path(value)]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest with ``function`` of every tensor; other leaves stay as they are.

    A mapping that cannot be written to becomes a dict.
    """
    if isinstance(value, Tensor):
        return function(value)
    parts, structure = tree_flatten(value, is_leaf=lambda part: part is not value)
    if not _is_leaf(value, parts):
        return tree_unflatten([map_tensors(function, part) for part in parts], structure)
    items = {key: map_tensors(function, item) for key, item in items_in(value)}
    if isinstance(value, (tuple, list)):
        make: Callable[[Any], Any] = getattr(value, "_make", type(value))
        return make(items.values())
    if isinstance(value, Mapping):
        return _with_items(value, items)
    return _with_attributes(value, items) if items else value


def add_nested(first: Any, second: Any) -> Any:
    """The sum of two nests of tensors of the same structure."""
    others = iter(tensors_in(second))
    return map_tensors(lambda tensor: tensor + next(others), first)


def moved(value: Any, device: torch.device | str) -> Any:
    """The same nest with its tensors on a device; those that are there are not copied.

    To a GPU they go from pinned memory, while the CPU goes on.
    """
    home = torch.device(device)

    def sent(tensor: Tensor) -> Tensor:
        if home.type != "cuda" or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return tensor.to(home)
        return tensor.pin_memory().to(home, non_blocking=True)

    return map_tensors(sent, value)


def _registered_parts(value: Any) -> list[Any]:
    """What _pytree knows that a value holds; nothing of a leaf."""
    parts = tree_flatten(value, is_leaf=lambda part: part is not value)[0]
    return [] if _is_leaf(value, parts) else parts


def _is_leaf(value: Any, parts: list[Any]) -> bool:
    return len(parts) == 1 and parts[0] is value


def _names(value: Any) -> list[str]:
    """The attributes that hold tensors: fields that have a value, or the scores of an output."""
    if isinstance(value, type):
        return []
    if is_dataclass(value):
        return [field.name for field in fields(value) if hasattr(value, field.name)]
    return ["logits"] if isinstance(getattr(value, "logits", None), Tensor) else []


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if not isinstance(value, MutableMapping):
        return items
    made = copy.copy(value)
    for key, item in items.items():
        made[key] = item
    return made


def _with_attributes(value: Any, attributes: dict[str, Any]) -> Any:
    made = copy.copy(value)
    for name, item in attributes.items():
        # As dataclasses do it themselves where an instance is frozen.
        object.__setattr__(made, name, item)
    return made
