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
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from benchmarks.common import results
from benchmarks.common.data import Data, Split, load
from benchmarks.common.options import (
    add_batch,
    add_metrics,
    checked_seeds,
    common,
    run,
    usable_device,
)
from benchmarks.common.settings import SIMILAR, Setting, chosen, profiled_batches
from benchmarks.common.tables import text_table
from benchmarks.common.training import accuracy, trained
from benchmarks.reports.rq1 import (
    COLUMNS,
    LAYER_COLUMNS,
    LAYERS,
    LIGHT,
    PAPER_COLUMNS,
    RATIOS,
    THETA_COLUMNS,
    THETAS,
    Point,
    layer_rows,
    paper_rows,
    plot,
    table_rows,
    theta_rows,
)
from nss_prune import Profile, Slice, profile
from nss_prune.deeparc import DeepArc


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
    print(text_table(COLUMNS, rows))
    print(f"\n{text_table(THETA_COLUMNS, thetas)}")
    if layers:
        print(f"\n{text_table(LAYER_COLUMNS, layers)}")
    if paper:
        print(f"\n{text_table(PAPER_COLUMNS, paper)}")
    print(f"\n{path} and {path.with_suffix('.png').name} written\n")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
    add_batch(parser)
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
        setting = setting.with_batch(asked.batch)
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        points = run_setting(
            setting, data, seeds, metrics, cache=asked.cache, threshold=asked.threshold
        )
        report(setting, data, points, metrics, seeds, asked.evaluated, asked.output)


if __name__ == "__main__":
    run(main)
