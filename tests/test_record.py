"""The record of a benchmark: entries that replace each other, and files that are gone on from."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.common import results
from benchmarks.common.record import Record, Tables
from benchmarks.common.tables import Column
from nss_prune.errors import ArgumentError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODULES = sorted(BENCHMARKS.rglob("*.py"))


@dataclass(frozen=True)
class Entry:
    seed: int
    name: str
    value: float


def record(path: Path, **options) -> Record[Entry]:
    def tables(entries):
        rows = [{"name": entry.name, "value": entry.value} for entry in entries]
        return Tables(
            (Column("name", "name"), Column("value", "value")), rows, {"note": "of sorts"}
        )

    return Record(path, "A title", Entry, lambda e: (e.seed, e.name), tables, options)


def test_an_entry_replaces_that_of_the_same_identity(tmp_path):
    found = record(tmp_path / "r.json")
    found.add([Entry(0, "a", 1.0), Entry(1, "a", 2.0)])
    found.add([Entry(0, "a", 3.0)])
    assert found.entries == [Entry(1, "a", 2.0), Entry(0, "a", 3.0)]
    assert (0, "a") in found
    assert (0, "b") not in found
    found.forget(lambda entry: entry.seed == 1)
    assert found.entries == [Entry(0, "a", 3.0)]


def test_a_file_is_gone_on_from_where_it_was_measured_likewise(tmp_path):
    path = tmp_path / "deep" / "r.json"
    first = record(path, epochs=(1, 2))
    first.resume()  # nothing is there
    first.add([Entry(0, "a", 1.0), Entry(3, "b", 2.0)])
    first.save()
    content = results.read(path)
    assert content["made_by"]["seeds"] == [0, 3]
    assert content["note"] == "of sorts"
    assert [row["value"] for row in content["rows"]] == [1.0, 2.0]
    again = record(path, epochs=[1, 2])
    again.resume()
    assert again.entries == first.entries
    with pytest.raises(ArgumentError, match="was measured with"):
        record(path, epochs=[1, 3]).resume()
    assert [item.name for item in path.parent.iterdir()] == ["r.json"]


def test_no_benchmark_shadows_a_package_of_the_tests():
    found = importlib.util.find_spec("coverage")
    assert found is None or BENCHMARKS not in Path(str(found.origin)).parents


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(BENCHMARKS)))
def test_files_and_functions_are_short(path):
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_benchmarks_import_each_other_as_a_package():
    own = {path.stem for path in MODULES} - {"__init__"}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module]
            assert not own & {name.split(".")[0] for name in names}, path
