"""Two sides timed in one run, memory in processes of their own, and rows for what came out."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.common import tables
from benchmarks.common.tables import Cell, Column

COLUMNS = (
    Column("what", "what"),
    Column("ours", "ours, s", 4),
    Column("other", "other, s", 4),
    Column("ratio", "ratio, median (min .. max)"),
    Column("target", "target"),
)
ROOT = Path(__file__).parents[2]
Rows = list[dict[str, Cell]]


def in_turn(
    first: Callable[[], object],
    second: Callable[[], object],
    repeats: int,
    *,
    warm: bool = True,
) -> tuple[list[float], list[float]]:
    """Seconds of both, run in turn; with `warm` after one run of each that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + warm):
        for function, found in ((first, times[0]), (second, times[1])):
            elapsed = seconds(function)
            if repeat >= warm:
                found.append(elapsed)
    return times


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio_row(
    what: str, ours: Sequence[float], other: Sequence[float], target: str, *, faster: bool
) -> dict[str, Cell]:
    """A row; the ratio is how many times faster ours is, or how many times as long it takes."""
    pairs = zip(ours, other, strict=True)
    ratios = sorted(theirs / mine if faster else mine / theirs for mine, theirs in pairs)
    word = "x faster" if faster else "x as long"
    middle = statistics.median(ratios)
    return {
        "what": what,
        "ours": statistics.median(ours),
        "other": statistics.median(other),
        "ratio": f"{middle:.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f}) {word}",
        "target": target,
    }


def resident_peak() -> float:
    """The largest resident set of this process so far, MB.

    From /proc where there is one: getrusage counts what the parent held before the exec, too.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return float(line.split()[1]) / 1024


def with_peak(function: Callable[[], object]) -> tuple[float, float | None]:
    """How long one call takes, and the memory that it takes at most beyond what was held, MB.

    The memory is None where the system does not let a process forget its earlier peak.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return seconds(function), None
    before = resident_peak()
    return seconds(function), resident_peak() - before


def printed_by(module: str, *words: str) -> list[float]:
    """The numbers that a module of the benchmarks prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def show(row: dict[str, Cell]) -> None:
    """Print a row as soon as it is known."""
    print("  ".join(tables.show(cell, 3) for cell in row.values() if cell != ""), flush=True)
