"""Reliability, counted: random networks, hostile files and faults for some minutes.

::

    python benchmarks/reliability.py --minutes 60

Writes ``benchmarks/results/reliability.json``: of each kind how many were tried, survived, were
refused in words, came out wrong, or raised a foreign exception, with what to make those again by,
which networks were refused and why, and which of the files with another value were accepted. A
hostile file that is accepted is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

from benchmarks.common.results import FOLDER, read, write
from benchmarks.common.tables import Cell, Column, text_table

RESULT = FOLDER / "reliability.json"
SHOWN = 300  # trials that are listed of each outcome
OUTCOMES = ("survived", "refused", "wrong", "foreign")
HOSTILE = "hostile files"
SHARES = {  # of the time
    "random networks": 50, HOSTILE: 9, "files with another value": 3, "cut and flipped files": 7,
    "kills": 6, "interrupts": 5, "memory limits": 4, "full disks": 2, "loader workers": 3,
    "modes of the caller": 2, "failing processes": 3, "cycles": 8,
}  # fmt: skip
MOST = {  # trials; what time is left goes to the others
    HOSTILE: 2000, "files with another value": 200, "cut and flipped files": 12_000, "kills": 300,
    "interrupts": 300, "memory limits": 200, "full disks": 300, "loader workers": 200,
    "modes of the caller": 200, "failing processes": 200, "cycles": 1000,
}  # fmt: skip
COLUMNS = (
    Column("what", "what"),
    Column("tried", "tried", 0),
    Column("survived", "survived", 0),
    Column("refused", "refused in words", 0),
    Column("wrong", "wrong", 0),
    Column("foreign", "foreign exceptions", 0),
)


def networks() -> Iterator[Callable[[], tuple[str, str]]]:
    """Trials of random networks, one a seed; a failure is of the smallest network that has it."""
    from architectures import architecture, shrunk
    from properties import attempted

    for seed in itertools.count():

        def trial(seed: int = seed) -> tuple[str, str]:
            outcome, why = attempted(architecture(seed))
            if outcome in ("survived", "refused"):
                return outcome, why
            smaller = shrunk(seed, lambda found: attempted(found)[0] == outcome)
            return outcome, f"{why}; also of {smaller}"

        yield trial


def crafted_files(folder: Path, hostile: bool) -> Iterator[Callable[[], tuple[str, str]]]:
    """Trials of files with changed contents and right digests, of each kind in turn.

    Args:
        hostile: Those that hold what this library could not have written, or the others.
    """
    from hostile import KINDS, attempt, crafted

    for name, kind in KINDS.items():
        kind.write(folder / name)
    for seed, name in ((seed, name) for seed in itertools.count() for name in KINDS):
        path = folder / "file"
        shutil.copy(folder / name, path)
        made = crafted(path, seed)
        if made.hostile != hostile:
            continue

        def trial(seed: int = seed, name: str = name, what: str = made.what) -> tuple[str, str]:
            outcome = attempt(KINDS[name], folder / "file")
            described = f"{name}, seed {seed}: {what}: {outcome.foreign or outcome.refusal!r}"
            if hostile and outcome.kind == "survived":
                return "wrong", f"accepted: {described}"
            return outcome.kind, "" if outcome.kind == "refused" else described

        yield trial


def faults_of(trials: Sequence[Any]) -> Iterator[Callable[[], tuple[str, str]]]:
    """Trials of faults around a pruning, in turn, each in a folder of its own."""
    for number in itertools.count():

        def trial(number: int = number) -> tuple[str, str]:
            tried = trials[number % len(trials)]
            with tempfile.TemporaryDirectory() as name:
                try:
                    outcome, why = tried(number, Path(name))
                except Exception as error:
                    outcome, why = "foreign", f"{type(error).__name__}: {error}"
            return outcome, f"{tried.__name__}, number {number}: {why}" if why else ""

        yield trial


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
    what: str, trials: Iterator[Callable[[], tuple[str, str]]], seconds: float, most: int
) -> tuple[dict[str, Cell], dict[str, list[str]]]:
    """The counts of what is tried within some time, and what each outcome was of."""
    counts, listed = Counter[str](), defaultdict[str, list[str]](list)
    end = time.monotonic() + seconds
    while time.monotonic() < end and counts.total() < most:
        outcome, described = next(trials)()
        counts[outcome] += 1
        if described and len(listed[outcome]) < SHOWN:
            listed[outcome].append(described)
    row = {kind: counts[kind] for kind in OUTCOMES}
    found: dict[str, Cell] = {"what": what, "tried": counts.total(), **row}
    print(text_table(COLUMNS, [found]), flush=True)
    return found, dict(listed)


def kinds_of_trials(folder: Path) -> dict[str, Iterator[Callable[[], tuple[str, str]]]]:
    """All that is tried, in this order."""
    from faults import faults

    folders = [folder / each for each in ("crafted", "free", "damaged")]
    for each in folders:
        each.mkdir()
    return {
        **{kind: faults_of(trials) for kind, trials in faults().items()},
        HOSTILE: crafted_files(folders[0], True),
        "files with another value": crafted_files(folders[1], False),
        "cut and flipped files": cut_and_flipped(folders[2]),
        "random networks": networks(),
    }


def tried(only: Sequence[str], seconds: float) -> Iterator[tuple[dict[str, Cell], Any]]:
    """The counts of each kind and its outcomes; what time one leaves goes to those behind it."""
    import torch

    torch.set_num_threads(1)  # forked processes cannot use the threads of their parent
    left = sum(SHARES[kind] for kind in only)
    with tempfile.TemporaryDirectory() as name:
        kinds = kinds_of_trials(Path(name))
        for kind in (kind for kind in kinds if kind in only):
            began = time.monotonic()
            share = max(0.0, seconds) * SHARES[kind] / left
            yield run(kind, kinds[kind], share, MOST.get(kind, sys.maxsize))
            seconds, left = seconds - (time.monotonic() - began), left - SHARES[kind]


def main() -> None:
    """Try everything, each for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of it")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file to write")
    parser.add_argument(
        "--only", nargs="+", choices=SHARES, help="kinds to try; the file keeps its other rows"
    )
    chosen = parser.parse_args()
    before: dict[str, Any] = {"rows": [], "listed": {}}
    if chosen.only:
        before = read(chosen.result)
    rows = {str(row["what"]): row for row in before["rows"]}
    made_by = before.get("made_by", {}).get("command", "")
    listed, commands = before["listed"], before.get("commands", dict.fromkeys(rows, made_by))
    for row, described in tried(chosen.only or list(SHARES), 60 * chosen.minutes):
        kind = str(row["what"])
        rows[kind], listed[kind] = row, described
        commands[kind] = " ".join(["python", *sys.argv])
    ordered = list(rows.values())
    details = {"listed": listed, "commands": commands}
    write(chosen.result, "Reliability", COLUMNS, ordered, seeds=[0], **details)
    print(text_table(COLUMNS, ordered))


if __name__ == "__main__":
    main()
