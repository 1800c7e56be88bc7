"""Faults at every point: some points of each operation, and those at which one once did harm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("files are counted as on Linux", allow_module_level=True)

from points import OPERATIONS, Fault, at_a_point, raised, unbroken
from tracer import Points

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("number", range(2 * len(OPERATIONS)))
def test_a_fault_at_any_point_changes_nothing_and_is_told(number: int, tmp_path: Path) -> None:
    outcome, why = at_a_point(number, tmp_path)
    assert outcome in ("survived", "refused"), why


FOUND = [
    # Put back by half: flags, after an error that was no interrupt.
    ("readapt all", "line of put_back in core/models.py", Fault),
    # A consumer was left for a reason that was none.
    ("refit and balance", "line of constant_map in compensation/constant.py", Fault),
    # A file that stayed open.
    ("save masks", "line of replacing in core/replacing.py", KeyboardInterrupt),
    # The reason was not told.
    ("load", "line of check in core/schema.py", Fault),
    ("load", "line of _check_header in core/files.py", Fault),
    # The thread of the deadline went on.
    ("constructor and theta", "line of end in graph/deadline.py", KeyboardInterrupt),
]


@pytest.mark.parametrize(("name", "place", "error"), FOUND)
def test_where_a_fault_once_did_harm(
    name: str, place: str, error: type[BaseException], tmp_path: Path
) -> None:
    """At the first point of each line of the function, and at one in the midst."""
    expected, value, points = unbroken(name)
    found: dict[str, list[int]] = {}
    for number, each in enumerate(points[False]):
        found.setdefault(each, []).append(number)
    lines = [numbers for each, numbers in found.items() if each.startswith(place)]
    assert lines
    for number in [number for each in lines for number in {each[0], each[len(each) // 2]}]:
        folder = tmp_path / str(number)
        folder.mkdir()
        at = Points(number, error("a fault"), everywhere=False)
        outcome, why = raised(name, at, folder, expected, value)
        assert outcome in ("survived", "refused"), why


def test_a_point_is_reached_where_it_was_counted() -> None:
    """An error is raised at the very line that the count has."""
    _, _, points = unbroken("sparsify")
    watched = Points(100, Fault("a fault"), everywhere=False)
    work = OPERATIONS["sparsify"].prepare(Path())
    with pytest.raises(Fault), watched.watched():
        OPERATIONS["sparsify"].act(work)
    assert watched.place == points[False][100]
