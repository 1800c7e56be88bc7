"""Fine-tuning after pruning, with the whole model as a teacher and without one.

    python benchmarks/finetuning.py                                   seconds, no download
    python benchmarks/finetuning.py --settings mlp-mnist,resnet20-cifar10 --data DIR

Each seed is a model of its own, pruned by NSSPruner to a share of its MACs (`divergence`, folded,
recalibrated where it has BatchNorm) on the board's pictures, and then trained for an epoch by
`nss_prune.finetune`, in the same order of the same training data at a tenth of the learning rate:

| method              | learns from                                                               |
|---------------------|---------------------------------------------------------------------------|
| pruned              | nothing                                                                   |
| labels              | the labels                                                                |
| distilled           | half the labels, half the whole model's outputs (temperature 2)           |
| teacher             | the whole model's outputs alone                                           |
| distilled-features  | as distilled, and which samples are alike where layers lost inputs        |

"ahead" is the lead over `labels`, in points, of the same models.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.board.boards import BOARDS, Board, Level
from benchmarks.board.cells import DIVERGENCE, OURS, Variant
from benchmarks.board.cli import numbers
from benchmarks.board.pruning import Calibration
from benchmarks.board.run import drawn
from benchmarks.common.data import Data, Split, load
from benchmarks.common.options import checked_seeds, common, in_order, run, usable_device
from benchmarks.common.record import Record, Tables
from benchmarks.common.tables import Cell, Column, spread, text_table
from benchmarks.common.training import (
    accuracy,
    make_optimiser,
    suitable_threads,
    take,
    trained,
)
from nss_prune import finetune
from nss_prune.compensation.recalibration import running_norms
from nss_prune.errors import ArgumentError

METHODS: dict[str, dict[str, Any] | None] = {
    "pruned": None,
    "labels": {},
    "distilled": {"distillation": 0.5, "temperature": 2.0},
    "teacher": {"distillation": 1.0, "temperature": 2.0},
    "distilled-features": {"distillation": 0.5, "temperature": 2.0, "features": 1.0},
}
"""Method -> what finetune is given besides the data; none where nothing is trained."""

PLAIN = ("pruned", "labels")  # without a teacher


@dataclass(frozen=True)
class Outcome:
    """Accuracies, shares from 0 to 1, and the seconds that the training took."""

    seed: int
    method: str
    kept: float
    accuracy: float
    whole: float
    seconds: float


@dataclass(frozen=True)
class Shuffled:
    """The batches of a split, augmented as a recipe says, in an order that a seed draws."""

    split: Split
    batch: int
    augment: bool
    seed: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(self.seed)
        for indices in torch.randperm(len(self.split), generator=random).split(self.batch):
            yield take(self.split, indices, self.augment, random)


def pruned(board: Board, whole: nn.Module, data: Data, seed: int, kept: float) -> nn.Module:
    """The whole model without what the board's own criterion takes."""
    split, _ = drawn(board, data, seed, redraw=False)
    example = next(data.train.batches(2))[0]
    batches = list(split.batches(board.batch))
    kind = "folded-recalibrated" if running_norms(whole) else "folded"
    calibration = Calibration(board, whole, example, batches, seed)
    found = calibration.prune(Variant(DIVERGENCE, OURS), Level("MACs", kept), kind)
    assert found is not None
    return found.model


def run_model(
    board: Board, whole: nn.Module, data: Data, seed: int, kept: float, methods: Sequence[str]
) -> Iterator[Outcome]:
    """What each method makes of one model."""
    start, recipe = pruned(board, whole, data, seed, kept), board.tuned
    dense = accuracy(whole, data.test)
    for method in methods:
        model, options, seconds = copy.deepcopy(start), METHODS[method], 0.0
        if options is not None:
            # Every epoch in the order of the first: there is one.
            batches = Shuffled(data.train, recipe.batch, recipe.augment, seed)
            torch.manual_seed(seed)
            seconds = finetune(
                model, batches, None if method in PLAIN else whole, epochs=recipe.epochs,
                optimizer=partial(make_optimiser, recipe=recipe), progress=False, **options,
            ).seconds  # fmt: skip
        yield Outcome(seed, method, kept, accuracy(model, data.test), dense, seconds)


def identity(outcome: Outcome) -> tuple[int, str, float]:
    """What tells an outcome from the others of its board."""
    return outcome.seed, outcome.method, outcome.kept


COLUMNS = (
    Column("method", "method"),
    Column("kept", "MACs kept"),
    Column("whole", "whole model, %"),
    Column("accuracy", "accuracy, %"),
    Column("lead", "ahead of labels, points"),
    Column("seconds", "s"),
)


def tables(outcomes: Sequence[Outcome]) -> Tables:
    """A row for each method and share."""
    found = {identity(outcome): outcome for outcome in outcomes}
    rows: list[dict[str, Cell]] = []
    for kept in sorted({outcome.kept for outcome in outcomes}, reverse=True):
        for method in METHODS:
            of = [o for o in outcomes if o.method == method and o.kept == kept]
            if not of:
                continue
            leads = [
                100 * (o.accuracy - found[o.seed, "labels", kept].accuracy)
                for o in of
                if method not in PLAIN and (o.seed, "labels", kept) in found
            ]
            row: dict[str, Cell] = {"method": method, "kept": kept}
            row["whole"] = spread([100 * o.whole for o in of])
            row["accuracy"] = spread([100 * o.accuracy for o in of])
            row["lead"] = spread(leads) if leads else None
            row["seconds"] = spread([o.seconds for o in of])
            rows.append(row)
    return Tables(COLUMNS, rows)


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
    add = parser.add_argument
    add("--methods", default="all",
        help=f"comma list of {', '.join(METHODS)}, or all (default)")  # fmt: skip
    add("--kept", default="0.6", metavar="SHARES",
        help="comma list of shares of the MACs to keep (default: %(default)s)")  # fmt: skip
    add("--tuned-epochs", type=int, default=1, metavar="N",
        help="epochs of fine-tuning (default: %(default)s)")  # fmt: skip
    parser.set_defaults(settings="mlp-digits")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    seeds, device = checked_seeds(asked.seeds), usable_device(asked.device)
    methods = in_order(asked.methods, METHODS, "method")
    for name in in_order(asked.settings, BOARDS, "setting"):
        board = replace(BOARDS[name], tuned_epochs=asked.tuned_epochs)
        board = replace(board, setting=board.setting.with_epochs(asked.epochs))
        setting = board.setting
        if not board.tuned.epochs:
            raise ArgumentError(f"{name} is a pretrained model without data to train it with.")
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        options = {"epochs": asked.tuned_epochs, "data": data.origin}
        record = Record(
            asked.output / f"finetuning-{name}.json", f"Fine-tuning, {name}", Outcome, identity,
            tables, options, device,
        )  # fmt: skip
        for seed in seeds:
            whole = trained(
                setting.name, setting.build, data, setting.recipe, seed, asked.cache, device
            ).model
            with suitable_threads(whole):
                for kept in numbers(asked.kept):
                    record.add(run_model(board, whole, data, seed, kept, methods))
            record.save()
        shown = tables(record.entries)
        print(f"\n{record.title}; data: {data.origin}; mean ± deviation of {len(seeds)} seed(s)\n")
        print(text_table(shown.columns, shown.rows))
        print(f"\n{record.path} written\n")


if __name__ == "__main__":
    run(main)
