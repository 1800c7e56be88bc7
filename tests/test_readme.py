"""The README runs, tables are those of the committed results, and what is packed has its links."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import (
    accuracy,
    classes,
    coverage,
    paper,
    pilot,
    quality,
    readme,
    rq1,
    rq2,
    rq3,
    rq4,
    speed,
)

ROOT = Path(__file__).parent.parent
SCRIPTS = (accuracy, classes, coverage, paper, pilot, quality, rq1, rq2, rq3, rq4, speed)
TEXT = (ROOT / "README.md").read_text("utf-8")


def load(name: str, path: Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_python_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    # Untrained models on noise: with other noise, a slice may happen to take every neuron.
    torch.manual_seed(0)
    for block in blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(block.replace("/tmp/", f"{tmp_path}/"), names)


@pytest.mark.parametrize("page", readme.PAGES, ids=["README", "headlines", "results"])
def test_tables_are_rendered_from_the_results(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("<!-- results: ") >= 1
    assert readme.rendered(text) == text


def test_the_default_benchmark_has_a_table() -> None:
    assert "<!-- results: rq2-mlp-digits -->" in readme.ALL_RESULTS.read_text("utf-8")


@pytest.mark.parametrize(
    "script", [accuracy, classes, coverage, paper, pilot, quality, rq1, rq2, rq3, rq4, speed]
)
def test_a_run_leaves_the_committed_results_alone(script: ModuleType) -> None:
    assert script.parser().parse_args([]).output.resolve() != readme.results.FOLDER


def test_links_within_the_repository_lead_somewhere() -> None:
    for page in readme.PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), link


def test_ci_runs_the_test_command() -> None:
    (command,) = re.findall(r"^(python3 .*pytest -n auto)$", TEXT, flags=re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text("utf-8")


def test_every_link_of_the_packed_readme_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    setup = load("setup", ROOT / "setup.py")
    monkeypatch.setattr(setup, "setup", lambda **given: found.update(given))
    monkeypatch.setenv("NSS_PRUNE_REPOSITORY", "https://host.example/owner/name/")
    setup.main()
    text = found["long_description"]
    assert not re.findall(r"\]\((?!https?:)", text)
    start = "https://host.example/owner/name"
    assert f"({start}/raw/main/docs/figures/overview.svg)" in text
    for path in re.findall(rf"{start}/(?:blob|raw)/main/([^)]+)", text):
        assert (ROOT / path).exists(), path
    assert all(address.startswith(start) for address in found["project_urls"].values())


def test_without_an_address_the_packed_readme_is_the_readme(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, Any] = {}
    setup = load("setup", ROOT / "setup.py")
    monkeypatch.setattr(setup, "setup", lambda **given: found.update(given))
    monkeypatch.delenv("NSS_PRUNE_REPOSITORY", raising=False)
    setup.main()
    assert found["long_description"] == TEXT
    assert found["project_urls"] == {}


def test_the_picture_is_drawn_by_its_script() -> None:
    figures = ROOT / "docs" / "figures"
    drawn = load("overview", figures / "overview.py").overview()
    assert drawn == (figures / "overview.svg").read_text("utf-8")
