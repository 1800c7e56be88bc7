"""Tables and plot of RQ1, slicing itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common.figures import pyplot, save_figure
from benchmarks.common.tables import Cell, Column, spread
from benchmarks.published import slicing as targets

STRATEGIES = ("semantic", "category", "global")
THETAS = tuple(round(0.90 + 0.01 * i, 2) for i in range(10))
LIGHT = (0.995, 0.999, 0.9999, 1.0)  # where the paper's thetas have not begun, others have
LAYERS = "deeparc"  # in the place of a metric and a strategy
RATIOS = tuple(round(0.1 * i, 1) for i in range(1, 11))

COLUMNS = (
    Column("metric", "Metric"),
    Column("strategy", "Strategy"),
    Column("mean", "mean accuracy %"),
    Column("lead", "lead, points"),
    Column("loss_30", "loss at CR 30 %"),
    Column("loss_50", "loss at CR 50 %"),
    Column("loss_70", "loss at CR 70 %"),
)
POINT_COLUMNS = (
    Column("CR", "CR %"),
    Column("accuracy", "accuracy %"),
    Column("loss", "loss, points"),
)
THETA_COLUMNS = (Column("metric", "Metric"), Column("theta", "theta", 4), *POINT_COLUMNS)
LAYER_COLUMNS = (
    Column("method", "Layers removed"),
    Column("models", "models", 0),
    *POINT_COLUMNS,
)
PAPER_COLUMNS = (
    Column("metric", "Metric"),
    Column("CR", "CR %"),
    Column("paper_loss", "paper's loss"),
    Column("loss", "our loss"),
)


@dataclass(frozen=True)
class Point:
    """One slice of one model.

    knob: theta of a semantic slice, ratio of the others, DeepArc's threshold.
    compression_rate, accuracy, dense: shares, 0 to 1; dense is the whole model's accuracy.
    """

    seed: int
    metric: str
    strategy: str
    knob: float
    compression_rate: float
    accuracy: float
    dense: float


def curve(points: Sequence[Point], strategy: str) -> tuple[np.ndarray, np.ndarray]:
    """Compression rates in ascending order, from 0 (the whole model) on, and accuracies."""
    mine = sorted(
        [(p.compression_rate, p.accuracy) for p in points if p.strategy == strategy]
        + [(0.0, points[0].dense)]
    )
    rates, accuracies = np.array(mine).T
    return rates, accuracies


def at_rate(points: Sequence[Point], strategy: str, rate: float) -> float | None:
    """Accuracy at a compression rate, between measured ones; None beyond them."""
    rates, accuracies = curve(points, strategy)
    return float(np.interp(rate, rates, accuracies)) if rate <= rates[-1] else None


def means(points: Sequence[Point]) -> dict[str, float]:
    """Strategy -> mean accuracy over the compression rates that all strategies reach."""
    curves = {strategy: curve(points, strategy) for strategy in STRATEGIES}
    end = min(rates[-1] for rates, _ in curves.values())
    grid = np.linspace(0, end, 501)
    return {s: float(np.interp(grid, *found).mean()) for s, found in curves.items()}


def table_rows(points: Sequence[Point], metrics: Sequence[str]) -> list[dict[str, Cell]]:
    """A row for each metric and strategy, over seeds."""
    rows = []
    for metric in metrics:
        by_seed = seeds_of(points, metric)
        averages = [means(same) for same in by_seed]
        for strategy in STRATEGIES:
            lead = [m["semantic"] - max(m["category"], m["global"]) for m in averages]
            row: dict[str, Cell] = {
                "metric": metric,
                "strategy": strategy,
                "mean": spread([100 * m[strategy] for m in averages]),
                "lead": spread([100 * value for value in lead]) if strategy == "semantic" else None,
            }
            for percent in (30, 50, 70):
                row[f"loss_{percent}"] = loss_at(by_seed, strategy, percent / 100)
            rows.append(row)
    return rows


def seeds_of(points: Sequence[Point], metric: str) -> list[list[Point]]:
    mine = [point for point in points if point.metric == metric]
    return [[p for p in mine if p.seed == seed] for seed in sorted({p.seed for p in mine})]


def loss_at(by_seed: Sequence[Sequence[Point]], strategy: str, rate: float) -> Cell:
    found = [at_rate(points, strategy, rate) for points in by_seed]
    reached = [
        100 * (points[0].dense - value)
        for points, value in zip(by_seed, found, strict=True)
        if value is not None
    ]
    return spread(reached) if len(reached) == len(found) else None


def theta_rows(points: Sequence[Point], metrics: Sequence[str]) -> list[dict[str, Cell]]:
    """What each theta removes and costs."""
    rows: list[dict[str, Cell]] = []
    for metric in metrics:
        for theta in (*THETAS, *LIGHT):
            same = [
                p
                for p in points
                if p.metric == metric and p.strategy == "semantic" and p.knob == theta
            ]
            rows.append({"metric": metric, "theta": theta, **point_cells(same)})
    return rows


def point_cells(points: Sequence[Point]) -> dict[str, Cell]:
    """What points of one kind remove and cost, over seeds."""
    return {
        "CR": spread([100 * p.compression_rate for p in points]),
        "accuracy": spread([100 * p.accuracy for p in points]),
        "loss": spread([100 * (p.dense - p.accuracy) for p in points]),
    }


def layer_rows(points: Sequence[Point]) -> list[dict[str, Cell]]:
    """DeepArc's row, over the models that it finds redundant layers in; none without any."""
    same = [point for point in points if point.strategy == LAYERS]
    if not same:
        return []
    method = f"DeepArc at {same[0].knob:g}"
    return [{"method": method, "models": len(same), **point_cells(same)}]


def paper_rows(setting: str, points: Sequence[Point]) -> list[dict[str, Cell]]:
    """The paper's losses at its compression rates beside ours."""
    return [
        {
            "metric": metric,
            "CR": rate,
            "paper_loss": loss,
            "loss": loss_at(by_seed, "semantic", rate / 100),
        }
        for metric, rate, loss in targets.FIGURE_5.get(setting, ())
        if (by_seed := seeds_of(points, metric))
    ]


def plot(setting: str, points: Sequence[Point], metrics: Sequence[str], path: Path) -> None:
    """A panel for each metric: accuracy against compression rate, a colour for each strategy."""
    figure, panels = pyplot.subplots(
        1, len(metrics), figsize=(3.6 * len(metrics), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, metric in zip(panels[0], metrics, strict=True):
        for same in seeds_of(points, metric):
            for number, strategy in enumerate(STRATEGIES):
                rates, accuracies = curve(same, strategy)
                label = strategy if same[0].seed == points[0].seed else None
                panel.plot(
                    100 * rates, 100 * accuracies, ".-", color=f"C{number}", alpha=0.6, label=label
                )
        stars = [(p.compression_rate, p.accuracy) for p in points if p.strategy == LAYERS]
        if stars:
            rates, accuracies = np.array(stars).T
            panel.plot(100 * rates, 100 * accuracies, "k*", markersize=10, label="DeepArc")
        panel.set(title=metric, xlabel="compression rate, %")
        panel.grid(alpha=0.3)
    panels[0][0].set(ylabel="test accuracy, %")
    panels[0][0].legend()
    figure.suptitle(f"RQ1, {setting}")
    save_figure(figure, path)
