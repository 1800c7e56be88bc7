"""Tables and plot of RQ2, model restructuring."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.common.figures import pyplot, save_figure
from benchmarks.common.tables import Cell, Column, spread
from benchmarks.published import slicing as targets
from benchmarks.reports.stopping import Pair, Point, Rule, Run, gain, means

METHODS = {"lamp": "LAMP", "global": "Global", "uniform+": "Uniform+", "erk": "ERK"}
MARGIN = 3.0  # points, the paper's mean gain, for the summary

COLUMNS = (
    Column("method", "Method"),
    Column("CR", "CR %"),
    Column("NI", "NI", 1),
    Column("MA", "MA %"),
    Column("paper_CR", "paper CR %"),
    Column("paper_NI", "paper NI", 0),
    Column("paper_MA", "paper MA %"),
    Column("iteration_seconds", "s/iteration", 3),
    Column("seconds", "s in all", 2),
)
SUMMARY_COLUMNS = (
    Column("rule", "NeuSemSlice + X against X alone"),
    Column("fewer_iterations", "fewer NI %"),
    Column("compression", "CR points"),
    Column("accuracy", "MA points"),
)


def table_rows(setting: str, pairs: Sequence[Pair], rule: Rule) -> list[dict[str, Cell]]:
    """Rows of the printed table: the dense model, the slice, and two rows a method."""
    by_method = {method: [pair for pair in pairs if pair.method == method] for method in METHODS}
    by_method = {method: same for method, same in by_method.items() if same}
    first = next(iter(by_method.values()))
    rows = [
        row("dense", [(pair.alone, pair.alone[0]) for pair in first]),
        row("NeuSemSlice", [(pair.sliced, pair.sliced[0]) for pair in first]),
    ]
    for method, same in by_method.items():
        ends = [rule.ends(pair) for pair in same]
        alone = [(pair.alone, end) for pair, (end, _) in zip(same, ends, strict=True)]
        after = [(pair.sliced, end) for pair, (_, end) in zip(same, ends, strict=True)]
        paper = targets.TABLE_4.get((setting, method))
        rows += [
            row(METHODS[method], alone, paper.alone if paper else None),
            row(f"NeuSemSlice + {METHODS[method]}", after, paper.sliced if paper else None),
        ]
    return rows


def row(
    name: str, ends: Sequence[tuple[Run, Point]], paper: targets.Target | None = None
) -> dict[str, Cell]:
    """One row over seeds; `ends` are the runs and the points where they stopped."""
    points = [end for _, end in ends]
    times = [[point.seconds for point in run[: end.iteration + 1]] for run, end in ends]
    iterated = [statistics.fmean(seconds[1:]) for seconds in times if len(seconds) > 1]
    return {
        "method": name,
        "CR": spread([100 * point.compression_rate for point in points]),
        "NI": spread([point.iteration for point in points]),
        "MA": spread([100 * point.test for point in points]),
        "paper_CR": paper.compression_rate if paper else None,
        "paper_NI": paper.iterations if paper else None,
        "paper_MA": paper.accuracy if paper else None,
        "iteration_seconds": spread(iterated) if iterated else None,
        "seconds": spread([sum(seconds) for seconds in times]),
    }


def summary(pairs: Sequence[Pair], tolerance: float) -> list[dict[str, Cell]]:
    """What NeuSemSlice + X gains on X alone under each rule, over all pairs, and in the paper."""
    rules = {
        "at the same CR": Rule("match", tolerance),
        f"at {MARGIN:g} points more CR": Rule("match", tolerance, MARGIN / 100),
        "at the same accuracy": Rule("accuracy", tolerance),
    }
    paper: dict[str, Cell] = {
        "rule": "the paper, over its six settings",
        "fewer_iterations": targets.FEWER_ITERATIONS,
        "compression": targets.HIGHER_COMPRESSION,
        "accuracy": targets.HIGHER_ACCURACY,
    }
    rows: list[dict[str, Cell]] = [
        {"rule": name, **gain([rule.ends(pair) for pair in pairs])} for name, rule in rules.items()
    ]
    return [*rows, paper]


def plot(setting: str, pairs: Sequence[Pair], path: Path) -> None:
    """Accuracy against compression rate, mean over seeds: a colour a method, dashed when alone."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, (method, name) in enumerate(METHODS.items()):
        same = [pair for pair in pairs if pair.method == method]
        for runs, label, style in (
            ([pair.alone for pair in same], name, ".--"),
            ([pair.sliced for pair in same], f"NeuSemSlice + {name}", ".-"),
        ):
            # Up to where the first seed stops: beyond it the mean would be over others.
            steps = [means(points) for points in zip(*runs, strict=False)]
            x, y = [100 * rate for _, rate, _ in steps], [100 * test for *_, test in steps]
            if steps:
                axes.plot(x, y, style, color=f"C{colour}", alpha=0.8, label=label)
    axes.set(xlabel="compression rate, %", ylabel="test accuracy, %", title=f"RQ2, {setting}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def recorded(pair: Pair) -> dict[str, object]:
    """A pair as a result file keeps it: for each run a list of each field of its points."""

    def columns(run: Run) -> dict[str, list[float]]:
        names = [field.name for field in fields(Point)]
        return {name: [round(getattr(point, name), 6) for point in run] for name in names}

    alone, after = columns(pair.alone), columns(pair.sliced)
    return {"method": pair.method, "seed": pair.seed, "alone": alone, "sliced": after}
