"""Short texts: what a repr shows of long lists and names, and values in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

import torch


def elided(items: Sequence[str], shown: int, what: str = "more") -> list[str]:
    """The first ``shown`` items, and how many more ``what`` there are, indented as they are."""
    if len(items) <= shown + 1:
        return list(items)
    indent = "  " if items[0].startswith("  ") else ""
    return [*items[:shown], f"{indent}... {len(items) - shown} {what}"]


def shortened(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, without its middle where it is longer."""
    if len(text) <= width:
        return text
    first = (width - 3) // 2
    return f"{text[:first]}...{text[len(text) - (width - 3 - first) :]}"


def listing(rows: Sequence[tuple[str, str]], shown: int, what: str) -> list[str]:
    """Indented lines of a name and a text each: the first ``shown``, and how many there are."""
    width = max((len(name) for name, _ in rows[: shown + 1]), default=0)
    return elided([f"  {name:<{width}}  {text}" for name, text in rows], shown, what)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def described(value: Any) -> Any:
    """A value as JSON can hold it, the same in every run: a function by its name."""
    if is_dataclass(value) and not isinstance(value, type):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, dict):
        return {str(key): described(item) for key, item in value.items()}
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    module = getattr(value, "__module__", None) or type(value).__module__
    return f"{module}.{name}"
