"""Reliability, counted: random networks, hostile files and faults of the data for some minutes.

::

    python benchmarks/reliability.py --minutes 60

Writes ``benchmarks/results/reliability.json``: of each kind how many were tried, survived, were
refused in words, came out wrong, or raised a foreign exception, with what to make those again by,
which networks were refused and why, and which crafted files were accepted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

from benchmarks.common.results import FOLDER, write
from benchmarks.common.tables import Cell, Column, text_table

RESULT = FOLDER / "reliability.json"
SHOWN = 300  # trials that are listed of each outcome
OUTCOMES = ("survived", "refused", "wrong", "foreign")
COLUMNS = (
    Column("what", "what"),
    Column("tried", "tried", 0),
    Column("survived", "survived", 0),
    Column("refused", "refused in words", 0),
    Column("wrong", "wrong", 0),
    Column("foreign", "foreign exceptions", 0),
)


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
            kind, _, why = outcome.partition(": ")
            return kind, f"seed {seed}, {found.parts}: {why}" if why else ""

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
                return ("refused", "") if outcome.refusal else ("survived", what)

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


def run(
    what: str, trials: Iterator[Callable[[], tuple[str, str]]], seconds: float
) -> tuple[dict[str, Cell], dict[str, list[str]]]:
    """The counts of what is tried within some time, and what each outcome was of."""
    counts, listed = Counter[str](), defaultdict[str, list[str]](list)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        outcome, described = next(trials)()
        counts[outcome] += 1
        if described and len(listed[outcome]) < SHOWN:
            listed[outcome].append(described)
    row = {kind: counts[kind] for kind in OUTCOMES}
    return {"what": what, "tried": sum(counts.values()), **row}, dict(listed)


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
        found = [
            run("random networks", networks(), 0.7 * seconds),
            run("crafted files", hostile_files(folder / "crafted"), 0.15 * seconds),
            run("cut and flipped files", cut_and_flipped(folder / "damaged"), 0.15 * seconds),
        ]
    rows = [row for row, _ in found]
    listed = {str(row["what"]): described for row, described in found}
    write(chosen.result, "Reliability", COLUMNS, rows, seeds=[0], listed=listed)
    print(text_table(COLUMNS, rows))


if __name__ == "__main__":
    main()
