"""Reliability, counted: random networks, hostile files and faults of the data for some minutes.

::

    python benchmarks/reliability.py --minutes 60

Writes ``benchmarks/results/reliability.json``: of each kind how many were tried, survived, were
refused in words, came out wrong, or raised a foreign exception, with what to make those again by.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULT = ROOT / "benchmarks" / "results" / "reliability.json"
SHOWN = 200  # failures that are listed


def networks() -> Iterator[Callable[[], tuple[str, str]]]:
    """Trials of random networks, one a seed."""
    from architectures import Violation, architecture, check

    seed = 0
    while True:

        def trial(seed: int = seed) -> tuple[str, str]:
            found = architecture(seed)
            try:
                outcome = check(found)
            except Violation as error:
                return "wrong", f"seed {seed}, {found.parts}: {error}"
            except Exception as error:
                return "foreign", f"seed {seed}, {found.parts}: {type(error).__name__}: {error}"
            return outcome.partition(":")[0], ""

        yield trial
        seed += 1


def hostile_files(folder: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """Trials of files with crafted contents and right digests, of each kind in turn."""
    from hostile import KINDS, attempt, crafted

    for name, kind in KINDS.items():
        kind.write(folder / name)
    seed = 0
    while True:
        for name, kind in KINDS.items():

            def trial(seed: int = seed, name: str = name, kind: Any = kind) -> tuple[str, str]:
                path = folder / "file"
                shutil.copy(folder / name, path)
                what = f"{name}, seed {seed}: {crafted(path, seed)}"
                outcome = attempt(kind, path)
                if outcome.foreign is not None:
                    return "foreign", f"{what}: {outcome.foreign!r}"
                if outcome.damaged:
                    return "wrong", f"{what}: {outcome.refusal!r}"
                return ("refused" if outcome.refusal else "survived"), ""

            yield trial
        seed += 1


def cut_and_flipped(folder: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """Trials of files cut at every length and with one bit flipped, of each kind in turn."""
    from hostile import KINDS, attempt

    for name, kind in KINDS.items():
        kind.write(folder / name)
    contents = {name: (folder / name).read_bytes() for name in KINDS}
    number = 0
    while True:
        for name, whole in contents.items():

            def trial(number: int = number, name: str = name, whole: bytes = whole) -> Any:
                place = number * 7919 % len(whole)
                changed = bytearray(whole[:place] if number % 2 else whole)
                if not number % 2:
                    changed[place] ^= 1 << number // 2 % 8
                (folder / "file").write_bytes(changed)
                outcome = attempt(KINDS[name], folder / "file")
                what = f"{name}, byte {place}, number {number}"
                if outcome.foreign is not None:
                    return "foreign", f"{what}: {outcome.foreign!r}"
                return (
                    ("refused", "") if outcome.refusal and not outcome.damaged else ("wrong", what)
                )

            yield trial
        number += 1


def run(trials: Iterator[Callable[[], tuple[str, str]]], seconds: float) -> dict[str, Any]:
    """The counts of what is tried within some time, and the failures."""
    counts, failures, end = Counter[str](), [], time.monotonic() + seconds
    while time.monotonic() < end:
        outcome, what = next(trials)()
        counts[outcome] += 1
        if what:
            failures.append(f"{outcome}: {what}")
    kinds = ("survived", "refused", "wrong", "foreign")
    return {
        "tried": sum(counts.values()),
        **{kind: counts[kind] for kind in kinds},
        "failures": failures[:SHOWN],
    }


def main() -> None:
    """Try everything, each for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of it")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file to write")
    chosen = parser.parse_args()
    seconds = 60 * chosen.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in ("crafted", "damaged"):
            (folder / each).mkdir()
        found = {
            "random networks": run(networks(), 0.7 * seconds),
            "crafted files": run(hostile_files(folder / "crafted"), 0.15 * seconds),
            "cut and flipped files": run(cut_and_flipped(folder / "damaged"), 0.15 * seconds),
        }
    found_all = {"minutes": chosen.minutes, **found}
    chosen.result.write_text(json.dumps(found_all, indent=1) + "\n")
    for kind, counts in found.items():
        print(kind, {key: value for key, value in counts.items() if key != "failures"})


if __name__ == "__main__":
    main()
