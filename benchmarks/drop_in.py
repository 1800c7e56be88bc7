"""torch-pruning's own tests with NSSPruner in the place of its pruners: what differs.

    python benchmarks/drop_in.py                      fetches the tests of the installed version
    python benchmarks/drop_in.py --tests DIR          uses those of a checkout
    python benchmarks/drop_in.py --only test_pruner

Each test file that names a pruner runs twice, in processes of their own: as it is, and with every
pruner of torch-pruning replaced by NSSPruner, with the same arguments. A row of the table is a
file: how many of its tests passed either way, and what the first that failed says. The tests are
not a part of this project: they are downloaded from torch-pruning's repository, by the version
installed.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import results  # noqa: E402
from benchmarks.common.options import run as run_script  # noqa: E402
from benchmarks.common.tables import Cell, Column, text_table  # noqa: E402
from nss_prune.errors import ArgumentError  # noqa: E402

ARCHIVE = "https://github.com/VainF/Torch-Pruning/archive/refs/tags/v{version}.tar.gz"
REPLACED = (
    "BasePruner", "MagnitudePruner", "MetaPruner", "BNScalePruner", "GroupNormPruner",
    "GrowingRegPruner",
)  # fmt: skip
PLUGIN = f"""
import torch_pruning as tp
from nss_prune import NSSPruner

for name in {REPLACED!r}:
    for place in (tp.pruner, tp):
        if hasattr(place, name):
            setattr(place, name, NSSPruner)
"""
COLUMNS = (
    Column("file", "test file"),
    Column("tests", "tests", 0),
    Column("theirs", "passed with torch-pruning", 0),
    Column("ours", "passed with NSSPruner", 0),
    Column("why", "the first that failed"),
)
MESSAGE = 160  # characters of it


@dataclass(frozen=True)
class Result:
    """Of a test file.

    Attributes:
        tests: Those that were not skipped.
        passed: Of these.
        why: The first line of the first that failed, or "".
    """

    tests: int
    passed: int
    why: str = ""


def fetched(folder: Path) -> Path:
    """The folder of torch-pruning's tests, downloaded.

    Raises:
        ArgumentError: They cannot be downloaded.
    """
    address = ARCHIVE.format(version=metadata.version("torch-pruning"))
    try:
        with urllib.request.urlopen(address) as answer:
            content = io.BytesIO(answer.read())
    except OSError as error:
        raise ArgumentError(f"{address}: {error}; give --tests, a checkout's folder") from error
    with tarfile.open(fileobj=content) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.glob("*/tests"))


def run(file: Path, plugin: Path | None, limit: float) -> Result:
    """The result of a test file.

    Args:
        plugin: A module that is imported before it, or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
        words += ["--rootdir", str(file.parent), "-c", os.devnull, f"--junitxml={report}"]
        paths = [str(ROOT)]
        if plugin is not None:
            words += ["-p", plugin.stem]
            paths.insert(0, str(plugin.parent))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        try:
            subprocess.run(words, cwd=folder, env=environment, capture_output=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return Result(0, 0, f"no result in {limit:g} s")
        return parsed(report)


def parsed(report: Path) -> Result:
    """The results of a file's tests."""
    if not report.exists():
        return Result(0, 0, "pytest wrote no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    tested = [case for case in cases if case.find("skipped") is None]
    failures = [(case, found) for case in tested if (found := _failure(case)) is not None]
    why = ""
    if failures:
        case, found = failures[0]
        message = found.get("message", "").strip().partition("\n")[0]
        why = f"{case.get('name')}: {message}"[:MESSAGE]
    return Result(len(tested), len(tested) - len(failures), why)


def _failure(case: ElementTree.Element) -> ElementTree.Element | None:
    found = case.find("failure")
    return case.find("error") if found is None else found


def has_pruner(file: Path) -> bool:
    """Whether a test file names a pruner that is replaced; others pass or fail alike."""
    text = file.read_text("utf-8")
    return any(name in text for name in REPLACED)


def rows(files: Sequence[Path], plugin: Path, limit: float) -> list[dict[str, Cell]]:
    """A row for each file; the results are printed as they come."""
    found: list[dict[str, Cell]] = []
    for file in files:
        theirs, ours = run(file, None, limit), run(file, plugin, limit)
        tests = max(theirs.tests, ours.tests)
        why = ours.why or theirs.why
        print(f"{file.stem}: {theirs.passed} -> {ours.passed} of {tests}  {why}", flush=True)
        found.append(
            {
                "file": file.stem,
                "tests": tests,
                "theirs": theirs.passed,
                "ours": ours.passed,
                "why": why,
            }
        )
    return found


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tests", type=Path, metavar="DIR", help="their folder (default: downloaded)")
    add("--only", default="", metavar="TEXT", help="files whose name contains this")
    add("--limit", type=float, default=300.0, metavar="SECONDS",
        help="of a file (default: %(default)s)")  # fmt: skip
    add("--output", type=Path, default=results.OUTPUT, metavar="DIR",
        help="folder of the result file (default: %(default)s)")  # fmt: skip
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        tests = fetched(Path(folder)) if asked.tests is None else asked.tests
        plugin = Path(folder) / "nss_prune_in_place.py"
        plugin.write_text(PLUGIN, "utf-8")
        named = sorted(file for file in tests.glob("test_*.py") if asked.only in file.stem)
        files = [file for file in named if has_pruner(file)]
        if not files:
            raise ArgumentError(f"{tests} has no test_*.py with {asked.only!r} and a pruner in it")
        found = rows(files, plugin, asked.limit)
    title = f"torch-pruning's own tests, {metadata.version('torch-pruning')}"
    path = asked.output / "drop-in.json"
    results.write(path, title, COLUMNS, found, seeds=[0])
    print(f"\n{text_table(COLUMNS, found)}\n\n{path} written")


if __name__ == "__main__":
    run_script(main)
