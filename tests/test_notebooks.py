"""The notebooks run, cell by cell, are small, and are linked."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
BY_NAME = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    found = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["quick_start", "tasks_and_attacks"]


@BY_NAME
def test_every_cell_runs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    names: dict[str, object] = {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cell in cells(path, "code"):
            exec("".join(cell["source"]).replace("/tmp/", f"{tmp_path}/"), names)
            printed = capsys.readouterr().out
            assert bool(printed) == bool(cell["outputs"])


@BY_NAME
def test_it_is_a_notebook_of_format_4_and_small(path: Path) -> None:
    book = json.loads(path.read_text("utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < 20_000
    names = [cell["id"] for cell in book["cells"]]
    assert len(set(names)) == len(names)
    for cell in cells(path, "code"):
        assert cell["execution_count"] is None
        assert all(output["output_type"] == "stream" for output in cell["outputs"])


@BY_NAME
def test_its_links_lead_somewhere_and_pages_lead_to_it(path: Path) -> None:
    for cell in cells(path, "markdown"):
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", "".join(cell["source"])):
            assert (path.parent / link).exists(), link
    name = f"notebooks/{path.name}"
    assert f"docs/{name}" in (ROOT / "README.md").read_text("utf-8")
    assert name in (ROOT / "docs" / "index.md").read_text("utf-8")
    assert f"notebooks/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text("utf-8")
