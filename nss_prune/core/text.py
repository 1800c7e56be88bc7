"""Short texts: what a repr shows of long lists and names."""

from __future__ import annotations

from collections.abc import Sequence


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
