"""Sentences and numbers of a report."""

from __future__ import annotations

from collections.abc import Sequence


def change(what: str, before: int, after: int) -> str:
    """What became of a count, such as "MACs: 5,000 -> 1,000 (80.0% gone)"."""
    share = f" ({1 - after / before:.1%} gone)" if before else ""
    return f"{what}: {before:,} -> {after:,}{share}"


def slower(latency: Sequence[float] | None) -> bool:
    """Whether a call was timed, and takes no less time than before."""
    return latency is not None and latency[1] >= latency[0]


NOT_FASTER = (
    "not faster with these inputs on this machine: latency_budget= prunes by seconds; widths that "
    "are multiples of 8, larger batches and other runtimes may be faster"
)


def latency_sentence(latency: Sequence[float]) -> str:
    """Seconds of a call before and after, and what to do where it is not faster."""
    before, after = latency
    text = f"latency of a call: {milliseconds(before)} -> {milliseconds(after)}"
    if slower(latency):
        return f"{text}, {NOT_FASTER}"
    return f"{text} ({before / after:.2f} x as fast)"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three digits."""
    return f"{seconds * 1000:.3g} ms"


def short(count: float) -> str:
    """A count with three digits and a unit, such as "4.65 M"."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}"


def megabytes(size: float) -> str:
    """Bytes as megabytes (10⁶), such as "120 MB"."""
    return f"{size / 1e6:.0f} MB" if size >= 1e7 or not size else f"{size / 1e6:.1f} MB"
