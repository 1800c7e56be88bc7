"""Run a board: draw the pictures, prune by every criterion, measure what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import hflip

from benchmarks.board.boards import Board, Level
from benchmarks.board.cells import TUNED, Measured, Variant
from benchmarks.board.pruning import Batches, Calibration, Tuning, by_channel
from benchmarks.common import tables
from benchmarks.common.data import Data, Split
from benchmarks.common.record import Record
from benchmarks.common.training import predictions, share_equal, suitable_threads, trained
from nss_prune import Views
from nss_prune.allocation.budget import TOLERANCE
from nss_prune.compensation.recalibration import running_norms
from nss_prune.errors import ArgumentError

Todo = tuple[Variant, Level, str]


@dataclass(frozen=True)
class Plan:
    """What is asked of a board.

    redraw: draw the test pictures anew with each seed.   cache: of trained models.
    """

    board: Board
    variants: Sequence[Variant]
    kinds: Sequence[str]
    seeds: Sequence[int]
    redraw: bool
    cache: Path

    def todo(self, record: Record[Measured], seed: int, kinds: Sequence[str]) -> list[Todo]:
        """What the record lacks of a seed."""
        return [
            (variant, level, kind)
            for variant in self.variants
            for level in self.board.levels
            for kind in kinds
            if variant.has(kind) and (seed, variant, str(level), kind) not in record
        ]


def place(cell: Measured) -> tuple[int, Variant, str, str]:
    """What tells a cell from the others of its board."""
    return cell.seed, cell.variant, cell.level, cell.kind


def run_board(plan: Plan, record: Record[Measured], data: Data) -> None:
    """Measure all cells that the record lacks; prints a line on each."""
    board, setting, device = plan.board, plan.board.setting, data.train.labels.device
    draws = {seed: [seed] for seed in plan.seeds} if board.models else {0: plan.seeds}
    for number, seeds in draws.items():
        found = trained(
            setting.name, setting.build, data, setting.recipe, number, plan.cache, device
        )
        run_model(replace(plan, seeds=seeds), record, found.model, data)


def run_model(plan: Plan, record: Record[Measured], model: nn.Module, data: Data) -> None:
    """Measure the cells of one model, for each draw of pictures."""
    board, model = plan.board, by_channel(model)
    kinds = possible(plan.kinds, model, board)
    with suitable_threads(model):
        for seed in plan.seeds:
            todo = plan.todo(record, seed, kinds)
            if todo:
                split, check = drawn(board, data, seed, plan.redraw)
                example = next(data.train.batches(2))[0]
                tuning = Tuning(data.train, board.tuned)
                calibration = Calibration(board, model, example, seen(board, split), seed, tuning)
                measure(record, calibration, check, todo)


def possible(kinds: Sequence[str], model: nn.Module, board: Board) -> list[str]:
    """The kinds that a model can have: it has norms to recalibrate, and data to train with."""
    found = list(kinds)
    if not running_norms(model):
        found = [kind for kind in found if "recalibrated" not in kind]
    if not board.tuned.epochs:
        found = [kind for kind in found if kind not in TUNED]
    return found


def drawn(board: Board, data: Data, seed: int, redraw: bool) -> tuple[Split, Split]:
    """The pictures that calibrate, and those that are checked with, which are others."""
    pool = joined(data.train, data.check, *([data.test] if redraw else []))
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    checked = len(data.test) if redraw else 0
    if len(pool) - checked < board.calibrated:
        raise ArgumentError(
            f"{board.calibrated} pictures are to calibrate, and {len(pool) - checked} are there; "
            "pass --calibrated with a smaller number."
        )
    order = order.to(pool.labels.device)
    split = pool.subset(order[checked : checked + board.calibrated])
    return split, pool.subset(order[:checked]) if redraw else data.test


def seen(board: Board, split: Split) -> Batches:
    """The batches that calibrate."""
    if not board.mirrored:
        return list(split.batches(board.batch))
    return Views(list(split.batches(board.batch // 2)), hflip)


def joined(*splits: Split) -> Split:
    """All samples of some splits."""
    pixels, labels = (
        torch.cat([getattr(s, part) for s in splits]) for part in ("pixels", "labels")
    )
    return replace(splits[0], pixels=pixels, labels=labels)


def measure(
    record: Record[Measured], calibration: Calibration, check: Split, todo: Sequence[Todo]
) -> None:
    """Prune and measure, and save the record after each cell."""
    batch = calibration.board.batch
    whole = predictions(calibration.model, check, batch)
    silent = set()
    for variant, level, kind in todo:
        if variant in silent:
            continue
        cell = measured(calibration, check, whole, variant, level, kind)
        if cell is None:
            silent.add(variant)
            continue
        record.add([cell])
        record.save()
        accuracy = tables.show(percent(cell.accuracy))
        print(f"seed {cell.seed}  {variant!s:24}  {cell.level:15}  {kind} {accuracy}", flush=True)


def measured(
    calibration: Calibration, check: Split, whole: Tensor, variant: Variant, level: Level, kind: str
) -> Measured | None:
    """One cell; None where the criterion says nothing of any layer.

    whole: the classes that the whole model gives the pictures that are checked with.
    """
    found = calibration.prune(variant, level, kind)
    if found is None:
        return None
    cell = Measured(
        calibration.seed, variant.criterion, variant.allocation, str(level), kind, found.reached,
        None, share_equal(whole, check.labels),
    )  # fmt: skip
    if found.reached > level.kept + TOLERANCE:
        return cell
    left = predictions(found.model, check, calibration.board.batch)
    return replace(
        cell, accuracy=share_equal(left, check.labels),
        class_drop=largest_drop(whole, left, check.labels), agreement=share_equal(left, whole),
    )  # fmt: skip


def largest_drop(before: Tensor, after: Tensor, labels: Tensor) -> float:
    """The largest share of its samples that a class has lost."""
    classes = int(labels.max()) + 1
    first, second, samples = (
        torch.bincount(named, minlength=classes)
        for named in (labels[before == labels], labels[after == labels], labels)
    )
    return float(((first - second) / samples.clamp(min=1)).max())


def percent(share: float | None) -> float | None:
    """A share in percent."""
    return None if share is None else 100 * share
