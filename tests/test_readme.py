"""The README runs, and its tables are those of the committed results."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

import readme

ROOT = Path(__file__).parent.parent
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


def test_tables_are_rendered_from_the_results() -> None:
    assert "<!-- results: rq2-mlp-digits -->" in TEXT
    assert readme.rendered(TEXT) == TEXT


def test_ci_runs_the_test_command() -> None:
    (command,) = re.findall(r"^(python3 .*pytest)$", TEXT, flags=re.MULTILINE)
    assert command in (ROOT / ".ci" / "run").read_text("utf-8")
