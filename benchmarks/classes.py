"""Pruned for some of the classes, against the same method without `classes=` at equal size.

    python benchmarks/classes.py                                       seconds, no download
    python benchmarks/classes.py --settings mlp-mnist,resnet20-cifar10 --data DIR

A seed draws the classes, and the pictures that calibrate. `classes=` prunes for them alone, to a
share of the whole model's multiply-accumulates. Beside it is the model pruned to the same share for
all classes, of whose outputs only those of the classes count ("all"), and the whole model likewise.
All are measured on the test pictures of these classes. Where there is one picture of each class, as
of ImageNet here, half of the classes' pictures calibrate and the others measure.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.board.boards import BOARDS, Board
from benchmarks.board.pruning import by_channel
from benchmarks.board.run import drawn, joined
from benchmarks.common import results, tables
from benchmarks.common.data import Data, Split
from benchmarks.common.options import checked_seeds, common, named, run
from benchmarks.common.seeds import data_of, models_of
from benchmarks.common.tables import Cell, Column, spread
from nss_prune import NSSPruner
from nss_prune.errors import ArgumentError

CLASSES, DEFAULT_CLASSES = {"mlp-mnist": 5, "efficientnet-imagenet-whole": 50}, 3
LEVELS, DEFAULT_LEVELS = {"efficientnet-imagenet-whole": (0.8, 0.6)}, (0.5, 0.2, 0.1, 0.05)
COLUMNS = (
    Column("kept", "MACs"), Column("whole", "whole model, %"), Column("classes", "classes=, %"),
    Column("all", "for all classes, %"), Column("ahead", "ahead, points"),
    Column("size", "its MACs %", 1), Column("other_size", "for all: MACs %", 1),
)  # fmt: skip
Values = dict[str, float]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a seed: those that calibrate, and those of its classes that measure."""

    classes: list[int]
    calibrating: Split
    measured: Split


def pictures(board: Board, data: Data, seed: int) -> Pictures:
    """By chance, as the seed has it."""
    pool = joined(data.train, data.check, data.test)
    count = int(pool.labels.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    classes = order[: CLASSES.get(board.name, DEFAULT_CLASSES)].sort().values
    if len(pool) > count:  # more than one picture of each
        split, test = drawn(board, data, seed, False)
        return Pictures(classes.tolist(), split, of(test, classes))
    mine = of(pool, classes)
    others = pool.subset((~torch.isin(pool.labels, classes)).nonzero().flatten())
    more = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    half = len(mine) // 2
    first = mine.subset(torch.arange(half))
    split = joined(first, others.subset(more[: board.calibrated - half]))
    return Pictures(classes.tolist(), split, mine.subset(torch.arange(half, len(mine))))


def of(split: Split, classes: Tensor) -> Split:
    """The pictures of some classes."""
    return split.subset(torch.isin(split.labels.cpu(), classes).nonzero().flatten())


def measure(board: Board, model: nn.Module, seen: Pictures, kept: float) -> Values:
    """Both ways of pruning to a share of the MACs."""
    batches = list(seen.calibrating.batches(board.batch))
    found = {"whole": accuracy(model, seen)}
    sizes = {}
    ways: dict[str, dict[str, Any]] = {"classes": {"classes": seen.classes}, "all": {}}
    for how, arguments in ways.items():
        smaller: nn.Module = copy.deepcopy(model)
        own: dict[str, Any] = {"macs_budget": kept, "data": batches, "progress": False}
        pruner = NSSPruner(smaller, batches[0][0][:2], **own, **arguments)
        pruner.step()
        assert pruner.report is not None
        sizes[how] = 100 * pruner.report.after.macs / pruner.report.before.macs
        found[how] = accuracy(by_channel(smaller), seen)
    ahead = found["classes"] - found["all"]
    return {**found, "ahead": ahead, "size": sizes["classes"], "other_size": sizes["all"]}


@torch.no_grad()
def accuracy(model: nn.Module, seen: Pictures) -> float:
    """Among the classes alone, in percent."""
    classes, right = torch.tensor(seen.classes), 0
    for inputs, labels in seen.measured.batches(250):
        scores = model.eval()(inputs).cpu()
        if scores.shape[1] > len(classes):
            scores = scores[:, classes]
        right += int((classes[scores.argmax(1)] == labels.cpu()).sum())
    return 100 * right / len(seen.measured)


def report(board: Board, found: dict[float, list[Values]], device: str, path: Path) -> None:
    """Print the table and write it."""
    rows: list[dict[str, Cell]] = [
        {"kept": f"{kept:g}", **{name: spread([one[name] for one in runs]) for name in runs[0]}}
        for kept, runs in found.items()
    ]
    count = CLASSES.get(board.name, DEFAULT_CLASSES)
    seeds = range(len(next(iter(found.values()))))
    results.write(
        path, f"Pruned for {count} classes, {board.name}", COLUMNS, rows, seeds=seeds,
        device=device, options={"calibrated": board.calibrated, "classes": count},
    )  # fmt: skip
    print(f"\n{tables.text_table(COLUMNS, rows)}\n\n{path} written\n")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
    parser.add_argument("--levels", help="comma list of shares of the MACs")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    checked_seeds(asked.seeds)
    for name in named(asked.settings, BOARDS, "setting"):
        board = BOARDS[name]
        setting = board.setting.with_epochs(asked.epochs)
        levels: tuple[float, ...] = LEVELS.get(name, DEFAULT_LEVELS)
        if asked.levels:
            levels = tuple(float(share) for share in asked.levels.split(","))
        if not all(0 < share <= 1 for share in levels):
            raise ArgumentError(f"--levels is {asked.levels}; shares are in (0, 1].")
        data = data_of(setting, asked)
        found: dict[float, list[Values]] = {kept: [] for kept in levels}
        for seed, model in models_of(setting, data, asked):
            model, seen = by_channel(model), pictures(board, data, seed)
            for kept in levels:
                found[kept].append(measure(board, model, seen, kept))
                print(f"seed {seed}, {kept:g}: {found[kept][-1]}", flush=True)
        report(board, found, asked.device, asked.output / f"classes-{name}.json")


if __name__ == "__main__":
    run(main)
