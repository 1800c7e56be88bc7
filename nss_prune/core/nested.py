"""Nested tensors: inputs and outputs of any structure.

A nest is what torch.utils._pytree knows (tuples, lists, dicts, namedtuples, and what libraries
register there, as transformers does its model outputs), any other mapping, sequence derived from
tuple or list, or dataclass. All else is a leaf.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nest, in order."""
    return list(_tensors(value))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same nest with ``function`` of every tensor; other leaves stay as they are.

    A mapping that cannot be written to becomes a dict.
    """
    leaves, structure = tree_flatten(value)
    return tree_unflatten([_mapped(function, leaf) for leaf in leaves], structure)


def add_nested(first: Any, second: Any) -> Any:
    """The sum of two nests of tensors of the same structure."""
    others = iter(tensors_in(second))
    return map_tensors(lambda tensor: tensor + next(others), first)


def moved(value: Any, device: torch.device | str) -> Any:
    """The same nest with its tensors on a device; those that are there are not copied."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), value)


def _tensors(value: Any) -> Iterator[Tensor]:
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        else:
            for part in _parts(leaf):
                yield from _tensors(part)


def _parts(leaf: Any) -> Iterator[Any]:
    """What a container holds that _pytree does not know."""
    if isinstance(leaf, Mapping):
        yield from leaf.values()
    elif isinstance(leaf, (tuple, list)):
        yield from leaf
    elif _is_dataclass(leaf):
        yield from (getattr(leaf, name) for name in _fields(leaf))


def _mapped(function: Callable[[Tensor], Tensor], leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return function(leaf)
    if isinstance(leaf, Mapping):
        items = {key: map_tensors(function, item) for key, item in leaf.items()}
        if not isinstance(leaf, MutableMapping):
            return items
        made = copy.copy(leaf)
        for key, item in items.items():
            made[key] = item
        return made
    if isinstance(leaf, (tuple, list)):
        parts = [map_tensors(function, part) for part in leaf]
        make: Callable[[Any], Any] = getattr(leaf, "_make", type(leaf))
        return make(parts)
    if _is_dataclass(leaf):
        made = copy.copy(leaf)
        for name in _fields(leaf):
            # As dataclasses do it themselves where an instance is frozen.
            object.__setattr__(made, name, map_tensors(function, getattr(leaf, name)))
        return made
    return leaf


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> list[str]:
    """The fields that have a value."""
    return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
