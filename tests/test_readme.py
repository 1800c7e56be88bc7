"""The README runs, and its tables are those of the committed results."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import ModuleType

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


def test_every_python_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    # Untrained models on noise: with other noise, a slice may happen to take every neuron.
    torch.manual_seed(0)
    for block in blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(block.replace("/tmp/", f"{tmp_path}/"), names)


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.parent.name)
def test_tables_are_rendered_from_the_results(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("<!-- results: ") >= 5
    assert readme.rendered(text) == text


def test_the_default_benchmark_has_a_table() -> None:
    assert "<!-- results: rq2-mlp-digits -->" in readme.PAGES[1].read_text("utf-8")


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
    (command,) = re.findall(r"^(python3 .*pytest)$", TEXT, flags=re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text("utf-8")
