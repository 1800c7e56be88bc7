"""Reliability, counted: random networks, hostile files and faults for some minutes.

::

    python benchmarks/reliability.py --minutes 60
    python benchmarks/reliability.py --only "random networks" --minutes 60   # 60 minutes more of it

Adds to ``benchmarks/results/reliability.json``: of each kind how many were tried, survived, were
refused in words, came out wrong, or raised a foreign exception, with what to make those again by,
which networks were refused and why, and which of the files with another value were accepted. A
hostile file that is accepted is wrong. Each run goes on with the number behind the last one of the
runs before it, until there are as many trials as ``MOST`` says; the file names them all, each with
its command, its versions and its numbers, and is written anew every minute.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "tests")]

from benchmarks.common.provenance import provenance
from benchmarks.common.results import FOLDER, read, write
from benchmarks.common.tables import Column, text_table

RESULT = FOLDER / "reliability.json"
SHOWN = 300  # trials that are listed of each outcome
OUTCOMES = ("survived", "refused", "wrong", "foreign")
HOSTILE, POINTS = "hostile files", "faults at every point"
SHARES = {  # of the time
    POINTS: 8, "kills": 6, "interrupts": 5, "memory limits": 4, "full disks": 2,
    "loaders": 3, "loader workers": 3,
    "modes of the caller": 2, "failing processes": 3, "cycles": 8, HOSTILE: 9,
    "files with another value": 3, "cut and flipped files": 7, "random networks": 50,
}  # fmt: skip
MOST = {  # trials of all runs; what time is left goes to the others
    POINTS: 6000, "kills": 300, "interrupts": 300, "memory limits": 200, "full disks": 300,
    "loaders": 200, "loader workers": 200, "modes of the caller": 200,
    "failing processes": 200, "cycles": 1000,
    HOSTILE: 2000, "files with another value": 200, "cut and flipped files": 12_000,
    "random networks": 2000,
}  # fmt: skip
COLUMNS = (
    Column("what", "what"),
    Column("tried", "tried", 0),
    Column("survived", "survived", 0),
    Column("refused", "refused in words", 0),
    Column("wrong", "wrong", 0),
    Column("foreign", "foreign exceptions", 0),
)
WRITTEN = 60.0  # seconds between two writes of the file

Attempt = Callable[[], tuple[str, str]]
"""Gives an outcome and a description, which is empty where there is nothing to list."""
Trials = Iterator[tuple[int, Attempt]]
"""Of one kind, each with the number that makes it again."""


def networks(first: int) -> Trials:
    """Trials of random networks, one a seed; a failure is of the smallest network that has it."""
    from architectures import architecture, shrunk
    from properties import attempted

    for seed in itertools.count(first):

        def trial(seed: int = seed) -> tuple[str, str]:
            outcome, why = attempted(architecture(seed))
            if outcome in ("survived", "refused"):
                return outcome, why
            smaller = shrunk(seed, lambda found: attempted(found)[0] == outcome)
            return outcome, f"{why}; also of {smaller}"

        yield seed, trial


def crafted_files(folder: Path, hostile: bool) -> Callable[[int], Trials]:
    """Trials of files with changed contents and right digests, of each kind in turn.

    Args:
        hostile: Those that hold what this library could not have written, or the others.
    """

    def trials(first: int) -> Trials:
        from hostile import KINDS, attempt, crafted

        for name, kind in KINDS.items():
            kind.write(folder / name)
        names, path = list(KINDS), folder / "file"
        for number in itertools.count(first):
            seed, name = number // len(names), names[number % len(names)]
            shutil.copy(folder / name, path)
            made = crafted(path, seed)
            if made.hostile != hostile:
                continue

            def trial(seed: int = seed, name: str = name, what: str = made.what) -> tuple[str, str]:
                outcome = attempt(KINDS[name], path)
                described = f"{name}, seed {seed}: {what}: {outcome.foreign or outcome.refusal!r}"
                if hostile and outcome.kind == "survived":
                    return "wrong", f"accepted: {described}"
                return outcome.kind, "" if outcome.kind == "refused" else described

            yield number, trial

    return trials


def faults_of(tried: Sequence[Any]) -> Callable[[int], Trials]:
    """Trials of faults around a pruning, in turn, each in a folder of its own."""

    def attempted(number: int) -> tuple[str, str]:
        fault = tried[number % len(tried)]
        with tempfile.TemporaryDirectory() as name:
            try:
                outcome, why = fault(number, Path(name))
            except Exception as error:
                outcome, why = "foreign", f"{type(error).__name__}: {error}"
        return outcome, f"{fault.__name__}, number {number}: {why}" if why else ""

    def trials(first: int) -> Trials:
        for number in itertools.count(first):
            yield number, functools.partial(attempted, number)

    return trials


def cut_and_flipped(folder: Path) -> Callable[[int], Trials]:
    """Trials of files cut at every length and with one bit flipped, of each kind in turn."""

    def trials(first: int) -> Trials:
        from hostile import KINDS

        for name, kind in KINDS.items():
            kind.write(folder / name)
        contents = [(name, (folder / name).read_bytes()) for name in KINDS]
        for number in itertools.count(first):
            of_kind, place = divmod(number, len(contents))
            damaged = (folder / "file", *contents[place], of_kind)
            yield number, functools.partial(_read_damaged, *damaged)

    return trials


def _read_damaged(path: Path, name: str, whole: bytes, number: int) -> tuple[str, str]:
    from hostile import KINDS, attempt

    place = number * 7919 % len(whole)
    changed = bytearray(whole[:place] if number % 2 else whole)
    if not number % 2:
        changed[place] ^= 1 << number // 2 % 8
    path.write_bytes(changed)
    outcome = attempt(KINDS[name], path)
    what = f"{name}, byte {place}, number {number}"
    if outcome.foreign is not None:
        return "foreign", f"{what}: {outcome.foreign!r}"
    return ("refused", "") if outcome.refusal and not outcome.damaged else ("wrong", what)


def kinds_of_trials(folder: Path) -> dict[str, Callable[[int], Trials]]:
    """All that is tried, in this order; each from a first number on."""
    from faults import faults
    from loaders import of_a_loader
    from points import at_a_point

    folders = [folder / each for each in ("crafted", "free", "damaged")]
    for each in folders:
        each.mkdir()
    return {
        POINTS: faults_of([at_a_point]),
        "loaders": faults_of([of_a_loader]),
        **{kind: faults_of(trials) for kind, trials in faults().items()},
        HOSTILE: crafted_files(folders[0], True),
        "files with another value": crafted_files(folders[1], False),
        "cut and flipped files": cut_and_flipped(folders[2]),
        "random networks": networks,
    }


@dataclass
class Count:
    """What some trials of one kind came to.

    Attributes:
        outcomes: How many came to each of OUTCOMES.
        listed: Outcome -> descriptions.
        following: The number behind that of the last trial.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    listed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    following: int = 0


def run(trials: Trials, seconds: float, most: int) -> Count:
    """What is tried within some time, but at most that many."""
    found, end = Count(), time.monotonic() + seconds
    while time.monotonic() < end and found.outcomes.total() < most:
        number, attempt = next(trials)
        outcome, described = attempt()
        found.outcomes[outcome] += 1
        found.following = number + 1
        if described:
            found.listed[outcome].append(described)
    return found


class Record:
    """The result file, to which runs add.

    Args:
        path: Need not exist.
        fresh: Kinds of which nothing is kept.
    """

    def __init__(self, path: Path, fresh: Sequence[str] = ()) -> None:
        before = read(path) if path.exists() else {"rows": [], "listed": {}, "runs": []}
        self.path = path
        self.rows = {str(row["what"]): row for row in before["rows"] if row["what"] not in fresh}
        self.listed = {kind: before["listed"].get(kind, {}) for kind in self.rows}
        self.runs = [each for each in before["runs"] if each["what"] not in fresh]
        self._own: dict[str, dict[str, Any]] = {}

    def tried(self, kind: str) -> int:
        """How many there were of a kind."""
        return int(self.rows[kind]["tried"]) if kind in self.rows else 0

    def following(self, kind: str) -> int:
        """The first number that was not tried."""
        return max((each["following"] for each in self.runs if each["what"] == kind), default=0)

    def add(self, kind: str, found: Count) -> None:
        """Add trials, which begin where the last ones ended, and write the file."""
        if not found.outcomes:
            return
        own = self._own.get(kind)
        if own is None:
            made_by = provenance([0], "cpu")
            own = {
                "what": kind, "tried": 0, "first": self.following(kind), "following": 0,
                **{key: made_by[key] for key in ("command", "date", "versions")},
            }  # fmt: skip
            self._own[kind] = own
            self.runs.append(own)
        own["following"] = found.following
        own["tried"] += found.outcomes.total()
        row = self.rows.setdefault(kind, {"what": kind, **dict.fromkeys(("tried", *OUTCOMES), 0)})
        row["tried"] += found.outcomes.total()
        for outcome in OUTCOMES:
            row[outcome] += found.outcomes[outcome]
        listed = self.listed.setdefault(kind, {})
        for outcome, described in found.listed.items():
            listed[outcome] = [*listed.get(outcome, []), *described][:SHOWN]
        self._write()

    def _write(self) -> None:
        details: dict[str, Any] = {"listed": self.listed, "runs": self.runs}
        rows = sorted(self.rows.values(), key=lambda row: list(SHARES).index(str(row["what"])))
        write(self.path, "Reliability", COLUMNS, rows, seeds=[0], **details)

    def __str__(self) -> str:
        return text_table(COLUMNS, list(self.rows.values()))


def try_all(record: Record, only: Sequence[str], seconds: float) -> None:
    """Try each kind for its share of the time; what one leaves goes to those behind it."""
    import torch

    torch.set_num_threads(1)  # forked processes cannot use the threads of their parent
    left = sum(SHARES[kind] for kind in only)
    with tempfile.TemporaryDirectory() as name:
        kinds = kinds_of_trials(Path(name))
        for kind in (kind for kind in kinds if kind in only):
            began = time.monotonic()
            end = began + max(0.0, seconds) * SHARES[kind] / left
            trials = kinds[kind](record.following(kind))
            while (rest := end - time.monotonic()) > 0 and record.tried(kind) < MOST[kind]:
                most = MOST[kind] - record.tried(kind)
                record.add(kind, run(trials, min(rest, WRITTEN), most))
            print(record, flush=True)
            seconds, left = seconds - (time.monotonic() - began), left - SHARES[kind]


def main() -> None:
    """Try everything, each for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of it")
    parser.add_argument("--result", type=Path, default=RESULT, help="the file to add to")
    parser.add_argument("--only", nargs="+", choices=SHARES, help="kinds to try")
    parser.add_argument(
        "--fresh", action="store_true", help="forget what the file has of the kinds to try"
    )
    chosen = parser.parse_args()
    only = chosen.only or list(SHARES)
    record = Record(chosen.result, only if chosen.fresh else ())
    try_all(record, only, 60 * chosen.minutes)


if __name__ == "__main__":
    main()
