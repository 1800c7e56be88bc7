"""Short texts: what a repr shows of long lists and names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def elided(items: Sequence[str], shown: int, what: str = "more") -> list[str]:
    """The first ``shown`` items, and how many ``what`` there are besides."""
    if len(items) <= shown + 1:
        return list(items)
    return [*items[:shown], f"... {len(items) - shown} {what}"]


def shortened(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, without its middle where it is longer."""
    if len(text) <= width:
        return text
    first = (width - 3) // 2
    return f"{text[:first]}...{text[len(text) - (width - 3 - first) :]}"


def aligned(rows: Iterable[tuple[str, str]], indent: str = "  ") -> list[str]:
    """Lines of a name and a text each, in two columns."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"{indent}{name:<{width}}  {text}".rstrip() for name, text in pairs]
