"""What the notes of a file may hold: checks of decoded JSON, made of one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from nss_prune.errors import FileFormatError

Check = Callable[[Any, str], None]
"""Function of a value and its place in the file that raises FileFormatError if it is wrong."""

LARGEST = 2**40  # of a count: far beyond any model, and far below what overflows
LONGEST = 10_000  # characters of a text


def refuse(where: str, value: object, allowed: str) -> FileFormatError:
    """The error for a value that is not what it must be."""
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return FileFormatError(f"{where or 'the file'} is {shown}; allowed is {allowed}")


def whole(least: int = 0, most: int = LARGEST) -> Check:
    """An integer in a range, bounds included."""

    def check(value: Any, where: str) -> None:
        if type(value) is not int or not least <= value <= most:
            raise refuse(where, value, f"an integer from {least} to {most}")

    return check


def number(least: float = -math.inf, most: float = math.inf) -> Check:
    """An int or float in a range; NaN only where the range is everything."""
    everything = least == -math.inf and most == math.inf

    def check(value: Any, where: str) -> None:
        right = type(value) in (int, float) and (everything or least <= value <= most)
        if not right or (type(value) is int and abs(value) > LARGEST):
            raise refuse(where, value, f"a number from {least} to {most}")

    return check


def text(value: Any, where: str) -> None:
    """A string of a length that can be shown."""
    if type(value) is not str or len(value) > LONGEST:
        raise refuse(where, value, f"a text of up to {LONGEST} characters")


def truth(value: Any, where: str) -> None:
    """True or False."""
    if type(value) is not bool:
        raise refuse(where, value, "true or false")


def one_of(*allowed: object) -> Check:
    """One of some values, of their types."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise refuse(where, value, f"one of {allowed}")

    return check


def either(*checks: Check) -> Check:
    """What one of some checks allows."""

    def check(value: Any, where: str) -> None:
        reasons = []
        for each in checks:
            try:
                return each(value, where)
            except FileFormatError as error:
                reasons.append(str(error).partition("; allowed is ")[2])
        raise refuse(where, value, " or ".join(reasons))

    return check


def array(item: Check, least: int = 0, most: int = LARGEST) -> Check:
    """A list of one kind of items."""

    def check(value: Any, where: str) -> None:
        if type(value) is not list or not least <= len(value) <= most:
            raise refuse(where, value, f"a list of {least} to {most} items")
        for position, each in enumerate(value):
            item(each, f"{where}[{position}]")

    return check


def row(*items: Check, optional: Check | None = None) -> Check:
    """A list of certain items in order, and perhaps one more."""
    lengths = (len(items), len(items) + (optional is not None))

    def check(value: Any, where: str) -> None:
        if type(value) is not list or len(value) not in lengths:
            raise refuse(where, value, f"a list of {len(items)} items")
        for position, each in enumerate(value):
            known = items[position] if position < len(items) else optional
            assert known is not None
            known(each, f"{where}[{position}]")

    return check


def table(item: Check) -> Check:
    """A dict of any names with one kind of values."""

    def check(value: Any, where: str) -> None:
        if type(value) is not dict:
            raise refuse(where, value, "a table")
        for key, each in value.items():
            text(key, f"a name in {where}")
            item(each, f"{where}[{key[:60]!r}]")

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A dict of certain names and no others."""
    known = {**required, **(optional or {})}

    def check(value: Any, where: str) -> None:
        if type(value) is not dict or not required.keys() <= value.keys() <= known.keys():
            shown = sorted(map(str, value)) if type(value) is dict else value
            raise refuse(where, shown, f"a table of {sorted(required)}, or also {sorted(known)}")
        for key, each in value.items():
            known[key](each, f"{where}.{key}" if where else key)

    return check


def anything(value: Any, where: str) -> None:
    """Whatever JSON can hold."""


def names(value: Any, where: str) -> None:
    """A list of texts of which none is there twice."""
    array(text)(value, where)
    if len(set(value)) < len(value):
        raise refuse(where, value, "a list without repetitions")


Floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_tensors(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> None:
    """Raise FileFormatError unless the file has exactly the tensors that its notes speak of."""
    differing = sorted(tensors.keys() ^ set(wanted))
    if differing:
        raise FileFormatError(f"the notes and the tensors differ in {differing[:4]}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: Collection[torch.dtype] = Floats,
) -> None:
    """Raise FileFormatError unless a tensor has a shape, with None for any size, and a dtype."""
    fits = len(shape) == tensor.dim() and all(
        wanted in (None, size) for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        raise FileFormatError(
            f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}; allowed is {shape} of "
            f"{', '.join(map(str, dtypes))}"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise FileFormatError if a tensor has infinite values or NaN."""
    if not bool(torch.isfinite(tensor).all()):
        raise FileFormatError(f"tensor {name!r} has values that are infinite or NaN")
