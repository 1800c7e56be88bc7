"""RQ1, slicing itself: accuracy against compression for semantic, category-wise and global slicing.

    python benchmarks/rq1.py                                           a minute, no download
    python benchmarks/rq1.py --settings mlp-mnist,mlp-fmnist --data DIR --seeds 5

For every setting and seed a model is trained (or taken from the cache) and profiled once, with
all metrics. From that profile come the semantic slices (theta 0.90 .. 0.99, and up to 1 so that
their curve starts where the others do) and the category-wise and global ones (the best 10 % ..
100 % of each layer). Everything outside a slice is masked, nothing is trained, and the accuracy is
measured on the test data (paper, section 5.2, Figure 5).

    CR    compression rate: share of the model's parameters that belong to masked neurons
    loss  points of accuracy lost against the whole model

Strategies are compared at equal compression: `mean` is the mean accuracy over the compression
rates that all three reach (the area under the curve, divided by its width), and `lead` the
semantic strategy's mean minus the better of the other two.

DeepArc, which removes whole layers, is one point for each model, a star in the plot: the model
without the layers that `--threshold` finds redundant, where there are any. Its CR is the share of
the parameters that are gone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import nn

from benchmarks.common import results, tables
from benchmarks.common.data import Data, Split, load
from benchmarks.common.figures import pyplot, save_figure
from benchmarks.common.options import add_metrics, checked_seeds, common, run, usable_device
from benchmarks.common.settings import SIMILAR, Setting, chosen
from benchmarks.common.tables import Cell, Column, spread
from benchmarks.common.training import accuracy, trained
from benchmarks.paper import slicing as targets
from nss_prune import Profile, Slice, profile
from nss_prune.deeparc import DeepArc

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


def run_setting(
    setting: Setting,
    data: Data,
    seeds: Sequence[int],
    metrics: Sequence[str],
    *,
    cache: Path,
    threshold: float = SIMILAR,
) -> list[Point]:
    """All slices of a setting, seed by seed; prints a line on each seed."""
    points: list[Point] = []
    for seed in seeds:
        device = data.train.labels.device
        found = trained(setting.name, setting.build, data, setting.recipe, seed, cache, device)
        batches = profiled_batches(setting, data)
        known = profile(found.model, batches, metrics=tuple(metrics))
        dense = accuracy(found.model, data.test)
        for metric in metrics:
            points += slices(known, found.model, data.test, metric, seed, dense)
        origin = "from the cache" if found.cached else f"in {found.seconds:.1f} s"
        print(f"{setting.name}, seed {seed}: trained {origin}, {100 * dense:.2f} %", flush=True)
        points += without_layers(found.model, batches, data.test, threshold, seed, dense)
    return points


def without_layers(
    model: nn.Module,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    test: Split,
    threshold: float,
    seed: int,
    dense: float,
) -> list[Point]:
    """DeepArc's point; none, and a line, where it finds no layer redundant."""
    found = DeepArc(model, batches, threshold, progress=False)
    if not found.redundant:
        similar = max(found.similarity.values())
        print(f"DeepArc: no layer is redundant: similarities reach {similar:.3f}", flush=True)
        return []
    smaller = found.restructure()
    rate = 1 - parameters(smaller) / parameters(model)
    print(f"DeepArc: without {', '.join(found.redundant)}", flush=True)
    return [Point(seed, LAYERS, LAYERS, threshold, rate, accuracy(smaller, test), dense)]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def profiled_batches(setting: Setting, data: Data) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The labelled batches that a setting's models are profiled with."""
    return list(data.train.per_category(setting.profiled).batches(500))


def slices(
    known: Profile, model: nn.Module, test: Split, metric: str, seed: int, dense: float
) -> list[Point]:
    """Every slice by one metric, measured."""

    def point(strategy: str, knob: float, critical: Slice) -> Point:
        with critical.masked(model):
            measured = accuracy(model, test)
        rate = critical.compression_rate(model)
        return Point(seed, metric, strategy, knob, rate, measured, dense)

    semantic = [point("semantic", t, known.slice(t, metric=metric)) for t in (*THETAS, *LIGHT)]
    return semantic + [
        point(strategy, ratio, known.slice(ratio=ratio, strategy=strategy, metric=metric))
        for strategy in ("category", "global")
        for ratio in RATIOS
    ]


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


def report(
    setting: Setting,
    data: Data,
    points: Sequence[Point],
    metrics: Sequence[str],
    seeds: Sequence[int],
    evaluated: int | None,
    output: Path,
) -> None:
    """Print the tables of a setting; write its result file and its plot."""
    rows, thetas = table_rows(points, metrics), theta_rows(points, metrics)
    layers, paper = layer_rows(points), paper_rows(setting.name, points)
    title = f"RQ1, {setting.name}"
    path = output / f"rq1-{setting.name}.json"
    results.write(
        path, title, COLUMNS, rows, seeds=seeds, device=data.train.labels.device,
        options={"profiled": setting.profiled, "evaluated": evaluated,
                 "recipe": asdict(setting.recipe), "data": data.origin},
        thetas=thetas, layers=layers, paper=paper, points=[asdict(point) for point in points],
    )  # fmt: skip
    plot(setting.name, points, metrics, path.with_suffix(".png"))
    print(f"\n{title}; data: {data.origin}; mean ± deviation of {len(seeds)} seed(s)\n")
    print(tables.text_table(COLUMNS, rows))
    print(f"\n{tables.text_table(THETA_COLUMNS, thetas)}")
    if layers:
        print(f"\n{tables.text_table(LAYER_COLUMNS, layers)}")
    if paper:
        print(f"\n{tables.text_table(PAPER_COLUMNS, paper)}")
    print(f"\n{path} and {path.with_suffix('.png').name} written\n")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
    add_metrics(parser)
    add = parser.add_argument
    add("--learning-rate", type=float, metavar="RATE",
        help="learning rate of training (default: the setting's)")  # fmt: skip
    add("--threshold", type=float, default=SIMILAR,
        help="similarity from which DeepArc finds a layer redundant (%(default)s)")  # fmt: skip
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    seeds, metrics = checked_seeds(asked.seeds), asked.metrics.split(",")
    device = usable_device(asked.device)
    for setting in chosen(asked.settings):
        setting = setting.with_epochs(asked.epochs).with_learning_rate(asked.learning_rate)
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        points = run_setting(
            setting, data, seeds, metrics, cache=asked.cache, threshold=asked.threshold
        )
        report(setting, data, points, metrics, seeds, asked.evaluated, asked.output)


if __name__ == "__main__":
    run(main)
