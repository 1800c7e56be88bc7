"""One table: the paper's number, ours, and which side is ahead."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import results
from benchmarks.common.tables import Cell, Column
from benchmarks.published import adaptation, slicing
from benchmarks.reports.rq2 import METHODS as PRUNERS

COLUMNS = (
    Column("table", "Table"),
    Column("setting", "Setting"),
    Column("quantity", "Quantity"),
    Column("paper", "paper"),
    Column("ours", "ours"),
    Column("ahead", "ahead"),
    Column("models", "models", 0),
    Column("epochs", "epochs", 0),
)
ATTACKS = ("fgsm", "pgd")
TABLE_6_METHODS = {
    "neusemslice": "NeuSemSlice",
    "neusemslice-replay-10": "NeuSemSlice + Replay 10 %",
}

Content = Mapping[str, Any]
Numbers = Iterator[dict[str, Cell]]


def comparison(settings: Sequence[str], folders: Sequence[Path]) -> list[dict[str, Cell]]:
    """A row for each number; ours from the first of the folders that has the file."""
    rows = []
    for question, numbers in NUMBERS.items():
        for setting in settings:
            content = found(f"{question}-{setting}.json", folders)
            for row in numbers(setting, content):
                rows.append({**row, "setting": setting, **conditions(content)})
    return rows


def found(name: str, folders: Sequence[Path]) -> Content | None:
    """What a result file holds; None where no folder has it."""
    paths = [folder / name for folder in folders if (folder / name).exists()]
    return results.read(paths[0]) if paths else None


def conditions(content: Content | None) -> dict[str, Cell]:
    """How many models there are, and the epochs that they trained."""
    if content is None:
        return {}
    models = len(content["made_by"]["seeds"])
    return {"models": models, "epochs": content["options"]["recipe"]["epochs"]}


def row(
    table: str, quantity: str, paper: float, ours: float | None, *, less: bool = False
) -> dict[str, Cell]:
    """The cells of one number; ``less`` is better where it says so."""
    if ours is None:
        ahead = "not measured"
    elif round(ours, 2) == round(paper, 2):
        ahead = "equal"
    else:
        ahead = "ours" if (ours < paper) == less else "paper"
    return {"table": table, "quantity": quantity, "paper": paper, "ours": ours, "ahead": ahead}


def figure_5(setting: str, content: Content | None) -> Numbers:
    """The points of accuracy that are lost at the compression rates which the paper names."""
    points = [] if content is None else content["paper"]
    losses = {(one["metric"], one["CR"]): mean_of(one["loss"]) for one in points}
    for metric, rate, loss in slicing.FIGURE_5.get(setting, ()):
        quantity = f"loss at CR {rate:g} %, {metric}, points"
        yield row("Figure 5", quantity, loss, losses.get((metric, rate)), less=True)


def mean_of(cell: Cell) -> float | None:
    if isinstance(cell, dict):
        return float(cell["mean"])
    return cell if isinstance(cell, float) else None


def table_4(setting: str, content: Content | None) -> Numbers:
    """Means over the methods that were run; the paper's are over the same."""
    papers = {method: slicing.TABLE_4.get((setting, method)) for method in PRUNERS}
    by_title = {} if content is None else {one["method"]: one for one in content["rows"]}
    run = [method for method in papers if PRUNERS[method] in by_title]
    pairs = {method: pair for method in run or papers if (pair := papers[method]) is not None}
    if not pairs:
        return
    alone = [by_title[PRUNERS[method]] for method in pairs] if run else []
    sliced = [by_title[f"NeuSemSlice + {PRUNERS[method]}"] for method in pairs] if run else []
    name = f"NeuSemSlice + X, {len(pairs)} X"

    def mean(rows: Sequence[Mapping[str, Cell]], key: str) -> float | None:
        return statistics.fmean(mean_of(one[key]) or 0.0 for one in rows) if rows else None

    for key, field in (("CR", "compression_rate"), ("MA", "accuracy")):
        paper = statistics.fmean(getattr(pair.sliced, field) for pair in pairs.values())
        yield row("Table 4", f"{name}: {key} %", paper, mean(sliced, key))
    before = statistics.fmean(pair.alone.iterations for pair in pairs.values())
    after = statistics.fmean(pair.sliced.iterations for pair in pairs.values())
    ours = fewer(mean(alone, "NI"), mean(sliced, "NI"))
    yield row("Table 4", f"{name}: fewer NI than X alone %", 100 * (1 - after / before), ours)


def fewer(before: float | None, after: float | None) -> float | None:
    """Percent fewer; None where there is nothing to be fewer than."""
    return 100 * (1 - after / before) if before and after is not None else None


def table_5(setting: str, content: Content | None) -> Numbers:
    """NeuSemSlice, means over both attacks and all models."""
    cells = [adaptation.TABLE_5.get((setting, attack, "neusemslice")) for attack in ATTACKS]
    mine = outcomes_of(content, "neusemslice")
    for key in ("tpr", "ra", "raa"):
        known = [getattr(cell, key) for cell in cells if cell is not None]
        if known:
            ours = 100 * statistics.fmean(one[key] for one in mine) if mine else None
            quantity = f"NeuSemSlice, both attacks: {key.upper()} %"
            yield row("Table 5", quantity, statistics.fmean(known), ours, less=key == "tpr")


def table_6(setting: str, content: Content | None) -> Numbers:
    """The average accuracy of both tasks, over all models."""
    for method, title in TABLE_6_METHODS.items():
        paper = adaptation.TABLE_6.get((setting, method))
        if paper is not None:
            mine = [statistics.fmean(one["final"]) for one in outcomes_of(content, method)]
            ours = 100 * statistics.fmean(mine) if mine else None
            yield row("Table 6", f"{title}: average %", paper.average, ours)


def outcomes_of(content: Content | None, method: str) -> list[Content]:
    if content is None:
        return []
    return [one for one in content["outcomes"] if one["method"] == method]


NUMBERS: Mapping[str, Callable[[str, Content | None], Numbers]] = {
    "rq1": figure_5,
    "rq2": table_4,
    "rq3": table_5,
    "rq4": table_6,
}
