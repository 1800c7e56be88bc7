"""Writes the tables of README.md, docs/headlines.md and those of all results, from committed files.

    python benchmarks/readme.py

A table stands between `<!-- results: NAME -->` and `<!-- end -->`. NAME is a result file, or
`NAME thetas`: what the thetas of that RQ1 file cost, by Taylor, `NAME summary`: what that file of
RQ2, RQ3 or RQ4 says in all, `NAME leads`: the best of every criterion on that accuracy board,
`NAME agreement`: the same by agreement with the whole model, or `NAME classes`: what the class that
loses most loses on it, with and without balance, `NAME limits` and `NAME drop`: what
`max_divergence` and `max_drop` found, `NAME slopes`: how that file of scale grows, or `coverage
costs`: what the allocation of every architecture cost. `headlines` is one table of all accuracy
boards.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.architectures.outcomes import COSTS
from benchmarks.board.cells import Measured
from benchmarks.board.tables import (
    AGREEMENT_COLUMNS,
    BEST,
    CLASS_COLUMNS,
    agreements,
    class_drops,
    summary,
)
from benchmarks.board.tables import SUMMARY_COLUMNS as LEADS
from benchmarks.common import results, tables
from benchmarks.common.storage import written_aside
from benchmarks.common.tables import Cell, Column
from benchmarks.reports.rq1 import THETA_COLUMNS
from benchmarks.reports.rq2 import SUMMARY_COLUMNS as GAINS
from benchmarks.reports.rq3 import SUMMARY_COLUMNS as CLAIMS
from benchmarks.reports.rq4 import SUMMARY_COLUMNS as TASK_CLAIMS
from benchmarks.scale import SLOPES

ROOT = Path(__file__).parent.parent
ALL_RESULTS = results.FOLDER / "README.md"
PAGES = (ROOT / "README.md", ROOT / "docs" / "headlines.md", ALL_RESULTS)
TABLE = re.compile(r"(<!-- results: (.+?) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
SHOWN_THETAS = (0.90, 0.95, 0.99)

LIGHT_AND_DEEP = ("MACs 0.8", "MACs 0.6")
HEADLINES = {
    "tf_efficientnet_lite0": ("efficientnet-imagenet-whole", LIGHT_AND_DEEP),
    "tf_efficientnet_lite0, hidden": ("efficientnet-imagenet-mirrored", LIGHT_AND_DEEP),
    "ResNet-20": ("resnet20-cifar10-models-anew", LIGHT_AND_DEEP),
    "VGG16, a quarter wide": ("vgg16-quarter-cifar10-models-anew", LIGHT_AND_DEEP),
    "AlexNet, a quarter wide": ("alexnet-quarter-cifar10-models", LIGHT_AND_DEEP),
    "ViT behind a stem": ("vit-stem-cifar10-models", LIGHT_AND_DEEP),
    "small ViT": ("vit-small-cifar10-heads", LIGHT_AND_DEEP),
    "MLP-MNIST": ("mlp-mnist-models", (*LIGHT_AND_DEEP, "parameters 0.1", "parameters 0.05")),
}
"""Model -> its accuracy board, and the levels to show."""
MEASURED = Column("measured", "measured")


def table(name: str) -> str:
    """The Markdown of one table."""
    if name == "headlines":
        return headlines()
    file, *part = name.split()
    content = results.read(results.FOLDER / f"{file}.json")
    if part == ["thetas"]:
        rows = [
            row
            for row in content["thetas"]
            if row["metric"] == "taylor" and row["theta"] in SHOWN_THETAS
        ]
        return tables.markdown_table(THETA_COLUMNS, rows)
    if part == ["leads"]:
        return leads(LEADS, summary(cells(content)))
    if part == ["agreement"]:
        return leads(AGREEMENT_COLUMNS, agreements(cells(content)))
    if part == ["classes"]:
        return tables.markdown_table(CLASS_COLUMNS, class_drops(cells(content)))
    if part in (["drop"], ["limits"]):
        shown = content["tables"][part[0]]
        return tables.markdown_table([Column(**one) for one in shown["columns"]], shown["rows"])
    if part == ["slopes"]:
        return tables.markdown_table(SLOPES, content["slopes"])
    if part == ["costs"]:
        return tables.markdown_table(COSTS, content["costs"])
    if part == ["summary"]:
        columns = {"rq3": CLAIMS, "rq4": TASK_CLAIMS}.get(file.partition("-")[0], GAINS)
        return tables.markdown_table(columns, content["summary"])
    return tables.markdown_table(content["columns"], content["rows"])


def headlines() -> str:
    """A few levels of every accuracy board."""
    rows: list[dict[str, Cell]] = []
    for model, (board, levels) in HEADLINES.items():
        content = results.read(results.FOLDER / f"accuracy-{board}.json")
        best = [row for row in summary(cells(content)) if row["kind"] == "untuned"]
        date = content["made_by"]["date"]
        rows += [
            {"model": model, **row, "measured": date} for row in best if row["level"] in levels
        ]
    shown = [column for column in LEADS if column.key != "kind"]
    return tables.markdown_table([Column("model", "model"), *shown, MEASURED], rows)


def cells(content: Mapping[str, Any]) -> list[Measured]:
    """What an accuracy board measured."""
    return [Measured(**cell) for cell in content["cells"]]


def leads(columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]]) -> str:
    """The rows that compare the best kinds."""
    best = [row for row in rows if row["kind"] in BEST]
    tuned = any(row["kind"] == "tuned" for row in best)
    shown = [column for column in columns if column.key != "kind" or tuned]
    return tables.markdown_table(shown, best)


def rendered(text: str) -> str:
    """``text`` with every table made anew."""
    return TABLE.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        with written_aside(page) as aside:
            aside.write_text(rendered(page.read_text("utf-8")), "utf-8")
