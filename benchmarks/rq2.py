"""RQ2, model restructuring: unstructured pruning alone against NeuSemSlice before it (Table 4).

    python benchmarks/rq2.py                                           about a minute, no download
    python benchmarks/rq2.py --settings mlp-mnist,mlp-fmnist --data DIR --seeds 5 --methods all

For every setting and seed a model is trained (or taken from the cache). Each method X then
prunes it twice, r of the remaining weights an iteration: alone, and after NeuSemSlice has
removed the neurons that are not critical. The columns are the paper's:

    CR  compression rate: share of the dense model's Conv and Linear weights that is gone
    NI  number of iterations of X that led there (slicing is none of them)
    MA  accuracy on the test data

When does a run stop? The paper does not say, and its Table 4 does not give it away. Here X alone
goes on for as long as its accuracy stays within `--tolerance` points of the dense model's; NI is
the last iteration before it first drops out. For NeuSemSlice + X there are two rules:

    --stop match     (default) it stops at the first iteration that compresses as much as X alone
                     did: the same compression, so compare NI and MA. This gives the paper's NI
                     in 15 of its 24 pairs; in the other 9 the paper goes one or two further.
                     `--margin` asks for that many points of CR more than X alone.
    --stop accuracy  it stops like X alone, at the same accuracy: compare CR and NI.

Accuracy within the tolerance is read on the check data, which is held out of the training data,
never on the test data that MA is measured on. Every run goes on until either rule can be applied
to it: the summary under the table gives both, and a result file keeps every iteration. There is
no training between iterations, unless `--finetune-epochs` asks for it: the paper does not say
whether it trains.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import nn

from benchmarks.common import results
from benchmarks.common.data import Data, load
from benchmarks.common.options import add_batch, checked_seeds, common, named, run, usable_device
from benchmarks.common.settings import Setting, chosen
from benchmarks.common.tables import text_table
from benchmarks.common.training import Recipe, accuracy, suitable_threads, train, trained
from benchmarks.reports.rq2 import (
    COLUMNS,
    MARGIN,
    METHODS,
    SUMMARY_COLUMNS,
    plot,
    recorded,
    summary,
    table_rows,
)
from benchmarks.reports.stopping import Pair, Point, Rule, Run, last_held
from nss_prune import NSSPruner
from nss_prune.errors import NothingToPruneError
from nss_prune.unstructured import Iterations, compression_rate, iterative_sparsify, weight_count

TOLERANCE = 0.5  # points
LIMIT = 100  # iterations; r = 5 % leaves 0.6 % of the weights by then
BEYOND = 0.05  # a run is followed, for the plot, until its accuracy lies this far below the floor

Finetune = Callable[[nn.Module], object]


def run_setting(
    setting: Setting,
    data: Data,
    seeds: Sequence[int],
    methods: Sequence[str],
    rule: Rule,
    *,
    finetune_epochs: int,
    cache: Path,
) -> list[Pair]:
    """All pairs of a setting, seed by seed; prints a line on each seed."""
    pairs = []
    for seed in seeds:
        device = data.train.labels.device
        found = trained(setting.name, setting.build, data, setting.recipe, seed, cache, device)
        finetune = finetuning(setting.recipe, data, finetune_epochs, seed)
        with suitable_threads(found.model):
            smaller, seconds, report = sliced(found.model, data, setting.theta, setting.profiled)
            compared = compare(
                found.model, smaller, data, methods, setting.rate, rule,
                seed=seed, slicing_seconds=seconds, finetune=finetune,
            )  # fmt: skip
        if seed == seeds[0]:
            print(report)
        origin = "from the cache" if found.cached else f"in {found.seconds:.1f} s"
        print(f"{setting.name}, seed {seed}: trained {origin}, {starts(compared[0])}", flush=True)
        pairs += compared
    return pairs


def starts(pair: Pair) -> str:
    """Where the two runs of a pair start, in words."""
    dense, smaller = pair.alone[0], pair.sliced[0]
    return (
        f"{100 * dense.test:.2f} % right; without {100 * smaller.compression_rate:.2f} % of its "
        f"weights, sliced in {smaller.seconds:.1f} s, {100 * smaller.test:.2f} %"
    )


def sliced(
    model: nn.Module, data: Data, theta: float, profiled: int
) -> tuple[nn.Module, float, str]:
    """A copy of `model` without its non-critical neurons, the seconds it took, and the report."""
    smaller = copy.deepcopy(model)
    start = time.perf_counter()
    batches = list(data.train.per_category(profiled).batches(250))
    # The paper removes neurons and does nothing else.
    pruner = NSSPruner(smaller, batches[0][0][:2], theta=theta, data=batches, fold=False)
    pruner.step()
    return smaller, time.perf_counter() - start, str(pruner.report)


def finetuning(recipe: Recipe, data: Data, epochs: int, seed: int) -> Finetune | None:
    """Training between iterations: `epochs` epochs at a tenth of the recipe's learning rate."""
    if epochs == 0:
        return None
    short = replace(recipe, epochs=epochs, learning_rate=recipe.learning_rate / 10)
    return lambda model: train(model, data.train, short, seed, title="fine-tune")


def compare(
    model: nn.Module,
    smaller: nn.Module,
    data: Data,
    methods: Sequence[str],
    rate: float,
    rule: Rule,
    *,
    seed: int = 0,
    slicing_seconds: float = 0.0,
    finetune: Finetune | None = None,
) -> list[Pair]:
    """Each method on `model` and on its slice `smaller`, far enough for either stop rule."""
    dense_weights = weight_count(model)
    dense = measured(model, data, dense_weights, 0.0)
    start = measured(smaller, data, dense_weights, slicing_seconds)
    floor = rule.floor(dense)
    margin = max(rule.margin, MARGIN / 100)

    def follow(start: Point, model: nn.Module, method: str, compression: float) -> Run:
        run, model = [start], copy.deepcopy(model)
        iterations = iterative_sparsify(
            model, rate, method, until=Iterations(LIMIT), finetune=finetune,
            dense_weights=dense_weights,
        )  # fmt: skip
        with suppress(NothingToPruneError):  # a method may leave layers dense, and run out
            for step in iterations:
                check, test = accuracy(model, data.check), accuracy(model, data.test)
                point = Point(step.number, step.compression_rate, check, test, step.seconds)
                run.append(point)
                if check < floor - BEYOND and point.compression_rate >= compression:
                    break
        return run

    pairs = []
    for method in methods:
        alone = follow(dense, model, method, 0.0)
        goal = last_held(alone, floor).compression_rate + margin
        pairs.append(Pair(method, seed, alone, follow(start, smaller, method, goal)))
    return pairs


def measured(model: nn.Module, data: Data, dense_weights: int, seconds: float) -> Point:
    """The point of a model before its first iteration."""
    check, test = accuracy(model, data.check), accuracy(model, data.test)
    return Point(0, compression_rate(model, dense_weights), check, test, seconds)


def report(
    setting: Setting,
    data: Data,
    pairs: Sequence[Pair],
    seeds: Sequence[int],
    rule: Rule,
    *,
    finetune_epochs: int,
    evaluated: int | None,
    output: Path,
) -> None:
    """Print the tables of a setting; write its result file and its plot."""
    rows, gains = table_rows(setting.name, pairs, rule), summary(pairs, rule.tolerance)
    title = f"RQ2, {setting.name} (theta {setting.theta:g}, r {100 * setting.rate:g} %)"
    options = {
        "theta": setting.theta, "rate": setting.rate, "profiled": setting.profiled,
        "recipe": asdict(setting.recipe), "finetune_epochs": finetune_epochs, **asdict(rule),
        "evaluated": evaluated, "data": data.origin,
    }  # fmt: skip
    path = output / f"rq2-{setting.name}.json"
    results.write(
        path, title, COLUMNS, rows, seeds=seeds, device=data.train.labels.device,
        options=options, summary=gains, runs=[recorded(pair) for pair in pairs],
    )  # fmt: skip
    plot(setting.name, pairs, path.with_suffix(".png"))
    print(f"\n{title}; data: {data.origin}; mean ± deviation of {len(seeds)} seed(s)\n")
    print(text_table(COLUMNS, rows))
    print(f"\n{text_table(SUMMARY_COLUMNS, gains)}")
    print(f"\n{path} and {path.with_suffix('.png').name} written\n")


def report_all(
    names: Sequence[str],
    pairs: Sequence[Pair],
    seeds: Sequence[int],
    tolerance: float,
    *,
    device: str,
    output: Path,
) -> None:
    """Print and write the summary over several settings."""
    rows, title = summary(pairs, tolerance), f"RQ2 over {', '.join(names)}"
    path = output / "rq2.json"
    results.write(path, title, SUMMARY_COLUMNS, rows, seeds=seeds, device=device)
    print(f"{title}\n\n{text_table(SUMMARY_COLUMNS, rows)}\n\n{path} written")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=5)
    add_batch(parser)
    add = parser.add_argument
    add("--methods", default="lamp",
        help=f"comma list of {', '.join(METHODS)}, or all (default: %(default)s)")  # fmt: skip
    add("--theta", type=float, help="similarity that a slice must reach (default: the setting's)")
    add("--stop", choices=("match", "accuracy"), default="match",
        help="where NeuSemSlice + X stops, see above (default: %(default)s)")  # fmt: skip
    add("--tolerance", type=float, default=TOLERANCE, metavar="POINTS",
        help="accuracy that may be lost on the check data (default: %(default)s)")  # fmt: skip
    add("--margin", type=float, default=0.0, metavar="POINTS",
        help="CR wanted beyond that of X alone, with --stop match (default: 0)")  # fmt: skip
    add("--finetune-epochs", type=int, default=0, metavar="N",
        help="epochs of training after every iteration (default: 0)")  # fmt: skip
    return parser


def chosen_methods(names: str) -> list[str]:
    """The methods that a comma-separated list names ("all": every one)."""
    return named(names, METHODS, "method")


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    seeds, methods = checked_seeds(asked.seeds), chosen_methods(asked.methods)
    device = usable_device(asked.device)
    rule = Rule(asked.stop, asked.tolerance / 100, asked.margin / 100)
    settings = [
        setting.with_epochs(asked.epochs).with_batch(asked.batch).with_theta(asked.theta)
        for setting in chosen(asked.settings)
    ]
    everything: list[Pair] = []
    for setting in settings:
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        pairs = run_setting(
            setting, data, seeds, methods, rule,
            finetune_epochs=asked.finetune_epochs, cache=asked.cache,
        )  # fmt: skip
        report(
            setting, data, pairs, seeds, rule,
            finetune_epochs=asked.finetune_epochs, evaluated=asked.evaluated,
            output=asked.output,
        )  # fmt: skip
        everything += pairs
    if len(settings) > 1:
        names = [setting.name for setting in settings]
        report_all(names, everything, seeds, rule.tolerance, device=device, output=asked.output)


if __name__ == "__main__":
    run(main)
