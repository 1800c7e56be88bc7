"""Pruned by quality: the divergence predicted against the real one, and max_drop against a sweep.

    python benchmarks/quality.py                                       seconds, no download
    python benchmarks/quality.py --settings mlp-mnist,resnet20-cifar10 --data DIR

The outputs of a model pruned to a budget are compared with those of the whole model on test
pictures, which neither trained nor calibrated: the mean Kullback-Leibler divergence, in nats,
beside what NSSPruner predicted, with what layers do together and added up, and beside what it
estimates for new pictures by halves of those that calibrate. Pictures that the model
was trained with say little of others, so that half of the check pictures calibrate; the rows
"training" show what those of the training set predict.

Then `max_divergence` chooses the size by itself: what it predicts is checked on the pictures that
calibrate, and the real divergence is beside its limit.

And `max_drop` finds the smallest model that loses a point on the other half, and the best of five
budgets that does is looked for by pruning to each of them. What is lost on the test pictures has
its standard error with it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.board.boards import BOARDS, Board, Level
from benchmarks.board.pruning import BUDGETS, ObservedOnce, by_channel
from benchmarks.board.run import joined
from benchmarks.common import results, tables
from benchmarks.common.data import Data, Split
from benchmarks.common.options import checked_seeds, common, named, run
from benchmarks.common.seeds import data_of, models_of
from benchmarks.common.tables import Cell, Column, spread
from nss_prune import NSSPruner, accuracy_on
from nss_prune.allocation.divergence import predicted
from nss_prune.pruner.eliminating import Eliminating
from nss_prune.pruner.halves import NewSamples
from nss_prune.pruner.strategies import DivergenceStrategy
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import Upkeep
from nss_prune.pruner.within_divergence import WithinDivergence

DROP = 1.0
SWEEP, DEEP_SWEEP = (0.9, 0.8, 0.7, 0.6, 0.5), (0.5, 0.3, 0.2, 0.1, 0.05)
PREDICTED = (
    Column("kept", "kept"), Column("by", "calibrated by"), Column("added", "layers added up", 4),
    Column("predicted", "predicted, nats", 4), Column("estimated", "estimated by halves", 4),
    Column("real", "real", 4), Column("ratio", "real / predicted"),
    Column("estimated_ratio", "real / estimated"),
)  # fmt: skip
DROPPED = (
    Column("how", "how"), Column("macs", "MACs kept %", 1), Column("held_out", "lost, held out"),
    Column("fresh", "lost, test"), Column("error", "standard error"),
    Column("seconds", "seconds", 1), Column("models", "models measured", 0),
)  # fmt: skip
LIMITED = (
    Column("limit", "max_divergence"), Column("macs", "MACs kept %", 1),
    Column("predicted", "predicted, nats", 4), Column("real", "real", 4),
    Column("ratio", "real / limit"),
)  # fmt: skip
LIMITS = (0.01, 0.03, 0.1)
Values = dict[str, float]
Found = list[dict[tuple[str, ...], Values]]  # for each seed: row -> column -> value


def parts_of(board: Board, data: Data, seed: int) -> dict[str, Split]:
    """What calibrates, "new" or of the "training" set, and what is "held out" for scores."""
    pretrained = board.setting.recipe.epochs == 0
    pool = joined(data.train, data.check) if pretrained else data.check
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    half = min(len(pool) // 2, board.calibrated)
    parts = {"new": pool.subset(order[:half]), "held out": pool.subset(order[half:])}
    if not pretrained:
        again = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
        parts["training"] = data.train.subset(again[:half])
    return parts


@torch.no_grad()
def log_probabilities(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Of each class, ``[samples, classes]``."""
    return torch.cat([model.eval()(inputs).double().log_softmax(1) for inputs, _ in batches])


def measure_predictions(
    board: Board, model: nn.Module, parts: Mapping[str, Split], test: Split
) -> dict[tuple[str, ...], Values]:
    """(level, what calibrates) -> predicted and real divergence."""
    found: dict[tuple[str, ...], Values] = {}
    whole = log_probabilities(model, test.batches(board.batch))
    for by in [name for name in ("new", "training") if name in parts]:
        batches = list(parts[by].batches(board.batch))
        eliminating = Eliminating(batches, True, upkeep=Upkeep(progress=False))
        within = ObservedOnce(WithinDivergence(eliminating, 0.0))
        strategy = ObservedOnce(DivergenceStrategy(eliminating))
        for level in board.levels:
            smaller = copy.deepcopy(model)
            pruner = pruned(smaller, batches, strategy=strategy, **{BUDGETS[level.of]: level.kept})
            evidence, chosen = pruner.evidence, pruner.slice
            subject = Subject(smaller, batches[0][0][:2], evidence.neurons)
            seen = within.observe(subject)
            estimate = NewSamples(subject, seen, eliminating, pruner.repairs).divergence(chosen)
            pruner.step()
            left = log_probabilities(by_channel(smaller), test.batches(board.batch))
            real = float((whole.exp() * (whole - left)).sum(1).mean())
            total = evidence.predictor.of(chosen)
            found[str(level), by] = {
                "added": predicted(chosen, evidence.eliminations), "predicted": total,
                "estimated": estimate, "real": real, "ratio": real / max(total, 1e-12),
                "estimated_ratio": real / max(estimate, 1e-12),
            }  # fmt: skip
            figures = f"predicted {total:.2g} estimated {estimate:.2g} real {real:.2g}"
            print(f"{level!s:16}{by:10} {figures}", flush=True)
    return found


def measure_limits(
    board: Board, model: nn.Module, parts: Mapping[str, Split], test: Split
) -> dict[tuple[str, ...], Values]:
    """(limit,) -> the size that `max_divergence` chose, and the divergence."""
    found: dict[tuple[str, ...], Values] = {}
    batches = list(parts["new"].batches(board.batch))
    whole = log_probabilities(model, test.batches(board.batch))
    for limit in LIMITS:
        smaller = copy.deepcopy(model)
        pruner = pruned(smaller, batches, max_divergence=limit)
        total = pruner.evidence.predictor.of(pruner.slice)
        pruner.step()
        left = log_probabilities(by_channel(smaller), test.batches(board.batch))
        real = float((whole.exp() * (whole - left)).sum(1).mean())
        found[(f"{limit:g}",)] = {
            "macs": 100 * macs_kept(pruner), "predicted": total, "real": real,
            "ratio": real / limit,
        }  # fmt: skip
        print(f"max_divergence {limit:g}: real {real:.4f}, {pruner.slice.rule}", flush=True)
    return found


def pruned(model: nn.Module, batches: Any, **arguments: Any) -> NSSPruner:
    return NSSPruner(model, batches[0][0][:2], data=batches, progress=False, **arguments)


def measure_drops(
    board: Board, model: nn.Module, parts: Mapping[str, Split], test: Split
) -> dict[tuple[str, ...], Values]:
    """("max_drop" or "sweep",) -> size, points lost and seconds."""
    batches = list(parts["new"].batches(board.batch))
    score = accuracy_on(list(parts["held out"].batches(board.batch)))
    calls: list[float] = []

    def counted(one: nn.Module) -> float:
        calls.append(score(one))
        return calls[-1]

    begin = time.perf_counter()
    smallest = copy.deepcopy(model)
    pruner = pruned(smallest, batches, score=counted, max_drop=DROP)
    pruner.step()
    spent, measured = time.perf_counter() - begin, len(calls)
    found = {("max_drop",): (smallest, macs_kept(pruner), spent, measured)}
    begin, whole = time.perf_counter(), score(model)
    best, kept = copy.deepcopy(model), 1.0
    for budget in DEEP_SWEEP if board.name.startswith("mlp") else SWEEP:
        other = copy.deepcopy(model)
        pruner = pruned(other, batches, macs_budget=budget)
        pruner.step()
        if score(other) >= whole - DROP and macs_kept(pruner) < kept:
            best, kept = other, macs_kept(pruner)
    found[("sweep",)] = (best, kept, time.perf_counter() - begin, 6)
    right = correct(model, test)
    lost: dict[tuple[str, ...], Values] = {}
    for row, (smaller, share, seconds, count) in found.items():
        difference = right - correct(smaller, test)
        lost[row] = {
            "macs": 100 * share, "held_out": whole - score(smaller),
            "fresh": 100 * float(difference.mean()),
            "error": 100 * float(difference.std()) / len(test) ** 0.5,
            "seconds": seconds, "models": float(count),
        }  # fmt: skip
        print(f"{row[0]:10} MACs {share:.1%}, lost {lost[row]['fresh']:.2f}", flush=True)
    return lost


def macs_kept(pruner: NSSPruner) -> float:
    assert pruner.report is not None
    return pruner.report.after.macs / pruner.report.before.macs


@torch.no_grad()
def correct(model: nn.Module, split: Split) -> Tensor:
    """1 where the class named is right, float64 ``[samples]``."""
    named = torch.cat([model.eval()(inputs).argmax(1) for inputs, _ in split.batches()])
    return (named == split.labels).double()


MEASURES = (measure_predictions, measure_limits, measure_drops)


def rows_of(found: Found, keys: Sequence[str]) -> list[dict[str, Cell]]:
    """A row for each of the first seed's, with the spread over the seeds."""
    rows = []
    for row, values in found[0].items():
        cells: dict[str, Cell] = dict(zip(keys, row, strict=True))
        cells.update({name: spread([seed[row][name] for seed in found]) for name in values})
        rows.append(cells)
    return rows


def report(board: Board, runs: Sequence[Found], device: str, data: Data, path: Path) -> None:
    """Print the tables and write them to one result file."""
    keys = (("kept", "by"), ("limit",), ("how",))
    predictions, limited, lost = (rows_of(*pair) for pair in zip(runs, keys, strict=True))
    results.write(
        path, f"By quality, {board.name}: predicted divergence", PREDICTED, predictions,
        seeds=range(len(runs[0])), device=device,
        options={"calibrated": board.calibrated, "data": data.origin, "drop": DROP},
        tables={
            "limits": {"columns": [asdict(column) for column in LIMITED], "rows": limited},
            "drop": {"columns": [asdict(column) for column in DROPPED], "rows": lost},
        },
    )  # fmt: skip
    print(f"\n{tables.text_table(PREDICTED, predictions)}\n\n{tables.text_table(LIMITED, limited)}")
    print(f"\n{tables.text_table(DROPPED, lost)}")
    print(f"\n{path} written\n")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
    parser.add_argument("--levels", help="comma list of shares of the MACs (default: the board's)")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    checked_seeds(asked.seeds)
    for name in named(asked.settings, BOARDS, "setting"):
        board = BOARDS[name]
        setting = board.setting.with_epochs(asked.epochs)
        levels = board.levels
        if asked.levels:
            levels = tuple(Level("MACs", float(share)) for share in asked.levels.split(","))
        board = Board(name, setting, board.calibrated, levels, board.batch)
        data = data_of(setting, asked)
        runs: list[Found] = [[], [], []]
        for seed, model in models_of(setting, data, asked):
            model, parts = by_channel(model), parts_of(board, data, seed)
            for kind, measure in zip(runs, MEASURES, strict=True):
                kind.append(measure(board, model, parts, data.test))
        report(board, runs, asked.device, data, asked.output / f"quality-{name}.json")


if __name__ == "__main__":
    run(main)
