"""torch-pruning's own tests with NSSPruner in the place of its pruners: what differs.

    python benchmarks/drop_in.py                      fetches the tests of the installed version
    python benchmarks/drop_in.py --tests DIR          uses those of a checkout
    python benchmarks/drop_in.py --only test_pruner

Each test file runs twice, in processes of their own: as it is, and with every pruner of
torch-pruning replaced by NSSPruner, with the same arguments. The table has a row for each file
whose result is not the same; a file without pruners passes or fails alike. The tests are not a part
of this project: they are downloaded from torch-pruning's repository, by the version installed.
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
TABLE = (
    Column("file", "test file"),
    Column("theirs", "torch-pruning"),
    Column("ours", "NSSPruner"),
    Column("why", "what it says"),
)
MESSAGE = 160  # characters of it


@dataclass(frozen=True)
class Result:
    """Of a test file.

    Attributes:
        outcome: "passed", "skipped", "failed" or "hang".
        why: The first line of what failed, or "".
    """

    outcome: str
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
            return Result("hang", f"no result in {limit:g} s")
        return parsed(report)


def parsed(report: Path) -> Result:
    """The worst result of a file's tests."""
    if not report.exists():
        return Result("failed", "pytest wrote no report")
    cases = list(ElementTree.parse(report).iter("testcase"))
    for case in cases:
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                message = found.get("message", "").strip().partition("\n")[0]
                return Result("failed", f"{case.get('name')}: {message}"[:MESSAGE])
    skipped = cases and all(case.find("skipped") is not None for case in cases)
    return Result("skipped" if skipped or not cases else "passed")


def rows(files: Sequence[Path], plugin: Path, limit: float) -> list[dict[str, Cell]]:
    """A row for each file whose results differ; both are printed as they come."""
    found: list[dict[str, Cell]] = []
    for file in files:
        theirs, ours = run(file, None, limit), run(file, plugin, limit)
        print(f"{file.stem}: {theirs.outcome} -> {ours.outcome}  {ours.why}", flush=True)
        if theirs.outcome != ours.outcome:
            why = ours.why or theirs.why
            found.append(
                {"file": file.stem, "theirs": theirs.outcome, "ours": ours.outcome, "why": why}
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
    add("--limit", type=float, default=300.0, metavar="SECONDS", help="(default: %(default)s)")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        tests = fetched(Path(folder)) if asked.tests is None else asked.tests
        plugin = Path(folder) / "nss_prune_in_place.py"
        plugin.write_text(PLUGIN, "utf-8")
        files = sorted(file for file in tests.glob("test_*.py") if asked.only in file.stem)
        if not files:
            raise ArgumentError(f"{tests} has no test_*.py with {asked.only!r} in its name")
        different = rows(files, plugin, asked.limit)
    print(f"\n{len(files)} files, {len(different)} with another result")
    if different:
        print(text_table(TABLE, different))


if __name__ == "__main__":
    main()
