"""The record of the reliability trials, to which runs add."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import reliability
from benchmarks.reliability import SHOWN, Record, Trials, run, try_all

OUTCOMES = ("survived", "refused")


def every_third_refused(first: int) -> Trials:
    for number in itertools.count(first):
        described = f"number {number}" if number % 3 == 0 else ""
        yield (
            number,
            lambda number=number, described=described: (
                OUTCOMES[number % 3 == 0],
                described,
            ),
        )


def odd_ones(first: int) -> Trials:
    """Numbers that are left out are not tried."""
    return (each for each in every_third_refused(first) if each[0] % 2)


def test_runs_add_up_and_go_on_with_fresh_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"kills": every_third_refused, "cycles": odd_ones}
    monkeypatch.setattr(reliability, "kinds_of_trials", lambda folder: kinds)
    path = tmp_path / "result.json"
    for most in (10, 25):
        monkeypatch.setattr(reliability, "MOST", dict.fromkeys(kinds, most))
        try_all(Record(path), list(kinds), 600.0)
    kills, cycles = json.loads(path.read_text())["rows"]
    assert (kills["tried"], kills["survived"], kills["refused"]) == (25, 16, 9)
    assert (cycles["tried"], cycles["survived"], cycles["refused"]) == (25, 17, 8)
    content = json.loads(path.read_text())
    assert content["listed"]["kills"]["refused"] == [f"number {n}" for n in range(0, 25, 3)]
    numbers = [(each["what"], each["first"], each["following"]) for each in content["runs"]]
    assert numbers == [
        ("kills", 0, 10), ("cycles", 0, 20), ("kills", 10, 25), ("cycles", 20, 50)
    ]  # fmt: skip
    assert all(each["command"] and each["versions"]["nss_prune"] for each in content["runs"])


def test_a_run_that_is_broken_off_has_written_what_it_tried(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    record, trials = Record(path), every_third_refused(0)
    for _ in range(3):
        record.add("kills", run(trials, 60.0, 4))
    again = Record(path)
    assert (again.tried("kills"), again.following("kills")) == (12, 12)
    assert len(again.runs) == 1


def test_fresh_kinds_are_forgotten_and_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    record = Record(path)
    for kind in ("kills", "cycles"):
        record.add(kind, run(every_third_refused(0), 60.0, 3 * SHOWN + 9))
    assert len(record.listed["kills"]["refused"]) == SHOWN
    again = Record(path, fresh=["kills"])
    assert (again.tried("kills"), again.following("kills")) == (0, 0)
    assert (again.tried("cycles"), again.following("cycles")) == (909, 909)
