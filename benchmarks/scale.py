"""Seconds and memory of a budget over samples, widths, categories and processes.

A whole step of NSSPruner at half of the MACs, beside bare forward and backward passes over the same
samples, and beside torch-pruning's Taylor and Hessian criteria, each in a process of its own of one
thread. One axis at a time; the others are at the first of their values. Seconds are those of the
CPU, which others on the machine do not change, and of several processes those of the first. The
slopes are those of a line through the logarithms: 1 where twice as much takes twice as long.

A step takes seconds that do not grow with the samples, and the same for each further sample. With
`--extrapolate`, those of more samples are on the line through the measured ones, and the table says
so; memory, which does not grow, is as measured. All are of 100 samples or more, since with fewer
the effects are not measured.

    python benchmarks/scale.py                                       # a minute or two
    python benchmarks/scale.py --models vit_base_patch16_224,vit_large_patch16_224 --depth 0 \\
        --size 224 --samples 128,512,4096 --categories 10,100,1000 --processes 1,2,4
    python benchmarks/scale.py --models vit_large_patch16_224 --depth 0 --size 224 \\
        --sides bare,ours --samples 128 --batch 8 --categories 10 --processes 1
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
import torch.distributed as dist
import torch_pruning as tp
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.functional import cross_entropy

from benchmarks.common import results, tables
from benchmarks.common.options import run
from benchmarks.common.tables import Cell, Column
from benchmarks.common.timing import show, with_peak
from benchmarks.rivals.ranking import GRADIENTS, set_gradients
from nss_prune import NSSPruner
from nss_prune.allocation.effects import LEAST_SAMPLES
from nss_prune.errors import ArgumentError

TITLE = "Scale: a budget beside bare passes"
SIDES = ("bare", "ours", "taylor", "hessian")
STAGES = {"convnext": "depths", "resnet": "layers"}
"""Family of timm's -> what says how many blocks its stages have."""
PRELOADED = ["benchmarks.scale"]
"""Imported once for all processes, which takes longer than what they do."""
AXES = ("samples", "model", "categories", "processes")
COLUMNS = (
    Column("axis", "axis"), Column("model", "model"), Column("samples", "samples", 0),
    Column("categories", "categories", 0), Column("processes", "processes", 0),
    Column("side", "side"), Column("seconds", "seconds", 2), Column("megabytes", "memory, MB", 0),
    Column("times", "x bare passes", 2), Column("kind", "kind"),
)  # fmt: skip
SLOPES = (
    Column("axis", "axis"), Column("side", "side"),
    Column("seconds", "slope of seconds"), Column("megabytes", "slope of memory"),
)  # fmt: skip

MEASURED, EXTRAPOLATED = "measured", "extrapolated"

Batches = list[tuple[Tensor, Tensor]]
Rows = list[dict[str, Cell]]


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        depth: Blocks that are left of the model, or of each of its stages; 0 for all.
        size: Of the pictures, in pixels.
        batch: Pictures at a time.
    """

    model: str
    samples: int
    categories: int
    processes: int
    depth: int
    size: int
    batch: int = 16

    def made(self) -> nn.Module:
        """The model, not trained: neither time nor memory depend on its weights."""
        torch.manual_seed(0)
        cut: dict[str, Any] = {}
        if self.model.startswith("vit"):
            cut = {"img_size": self.size, **({"depth": self.depth} if self.depth else {})}
        elif self.depth:
            family = next((name for name in STAGES if self.model.startswith(name)), None)
            if family is None:
                known = ", ".join(("vit", *STAGES))
                raise ArgumentError(f"--depth cuts {known} models, not {self.model}; give 0")
            cut = {STAGES[family]: (self.depth,) * 4}
        return timm.create_model(self.model, num_classes=self.categories, **cut).eval()

    def data(self, rank: int = 0) -> Batches:
        """The batches of a process."""
        torch.manual_seed(1)
        inputs = torch.randn(self.samples, 3, self.size, self.size)
        labels = torch.arange(self.samples) % self.categories
        batches = list(zip(inputs.split(self.batch), labels.split(self.batch), strict=True))
        return batches[rank :: self.processes]


def bare(model: nn.Module, data: Batches) -> None:
    """Forward and backward passes."""
    for inputs, labels in data:
        cross_entropy(model(inputs), labels).backward()
        model.zero_grad()


def ours(model: nn.Module, data: Batches) -> None:
    """Half of the MACs, with all that NSSPruner does by default."""
    NSSPruner(model, data[0][0][:1], data=data, macs_budget=0.5, progress=False).step()


def ranked(kind: str, model: nn.Module, data: Batches) -> None:
    """Half of the channels by one of torch-pruning's criteria, gradients included."""
    set_gradients(model, GRADIENTS[kind](model, data))
    criterion = {
        "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }[kind]()
    NSSPruner(model, data[0][0][:1], criterion, pruning_ratio=0.5, fold=False).step()


def measured(side: str, case: Case, rank: int = 0) -> tuple[float, float]:
    """Seconds of the CPU, and MB beyond the model and its data."""
    model, data = case.made(), case.data(rank)
    with torch.no_grad():
        model(data[0][0][:1])
    sides: dict[str, Callable[[nn.Module, Batches], None]] = {"bare": bare, "ours": ours}
    before = time.process_time()
    _, megabytes = with_peak(
        lambda: sides[side](model, data) if side in sides else ranked(side, model, data)
    )
    return time.process_time() - before, megabytes or 0.0


def member(rank: int, side: str, case: Case, folder: str) -> None:
    """One of the processes; the first writes what it measured."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if case.processes > 1:
        method = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=case.processes)
    found = measured(side, case, rank)
    if rank == 0:
        Path(folder, "found").write_text(" ".join(map(str, found)))
    if case.processes > 1:
        dist.destroy_process_group()


def one_case(side: str, case: Case) -> list[float]:
    """What :func:`measured` gives, in as many processes as the case says."""
    get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            member, (side, case, folder), nprocs=case.processes, start_method="forkserver"
        )
        return [float(word) for word in Path(folder, "found").read_text().split()]


def cases(first: Case, values: dict[str, list[Any]]) -> Iterator[tuple[str, Case]]:
    """Axis and case, one axis at a time; the first case alone where no axis has two values."""
    varied = {axis: along for axis, along in values.items() if len(along) > 1}
    for axis, along in (varied or {"model": [first.model]}).items():
        for value in along:
            yield axis, replace(first, **{axis: value})


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the line through the logarithms, by least squares; None of fewer than two."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean = [sum(axis) / len(logs) for axis in zip(*logs, strict=True)]
    above = sum((x - mean[0]) * (y - mean[1]) for x, y in logs)
    return float(above / sum((x - mean[0]) ** 2 for x, _ in logs))


def slopes(rows: Rows) -> Rows:
    """For every axis and side; widths are the numbers of parameters."""
    found: Rows = []
    for axis, side in dict.fromkeys((row["axis"], row["side"]) for row in rows):
        own = [row for row in rows if (row["axis"], row["side"]) == (axis, side)]
        key = "parameters" if axis == "model" else str(axis)
        values = {
            what: slope([(float(row[key]), float(row[what])) for row in own])  # type: ignore[arg-type]
            for what in ("seconds", "megabytes")
        }
        found.append({"axis": axis, "side": side, **values})
    return found


def rows_of(
    sides: Sequence[str],
    first: Case,
    values: dict[str, list[Any]],
    write: Callable[[Rows], None],
) -> None:
    """A row for each side of each case; what two axes share is measured once.

    Args:
        write: Called after each case with all rows so far.
    """
    rows: Rows = []
    known: dict[tuple[str, Case], list[float]] = {}
    for axis, case in cases(first, values):
        parameters = sum(parameter.numel() for parameter in case.made().parameters())
        alone = 0.0
        for side in sides:
            if (side, case) not in known:
                known[side, case] = one_case(side, case)
            taken, megabytes = known[side, case]
            alone = taken if side == "bare" else alone
            rows.append({
                "axis": axis, **asdict(case), "side": side, "seconds": taken,
                "megabytes": megabytes, "times": taken / alone if alone else None,
                "parameters": parameters, "kind": MEASURED,
            })  # fmt: skip
            show({column.key: rows[-1][column.key] for column in COLUMNS})
        write(rows)


def extrapolated(rows: Rows, samples: int) -> Rows:
    """Seconds of more samples for each side, on the line through those measured."""
    found: Rows = []
    alone = 0.0
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["axis"] == "samples" and row["side"] == side]
        points = [(float(row["samples"]), float(row["seconds"])) for row in own]  # type: ignore[arg-type]
        taken = line(points, samples)
        alone = taken if side == "bare" else alone
        found.append({
            **own[-1], "samples": samples, "seconds": taken, "megabytes": None,
            "times": taken / alone if alone else None, "kind": EXTRAPOLATED,
        })  # fmt: skip
    return found


def line(points: Sequence[tuple[float, float]], at: float) -> float:
    """The line through some points, by least squares."""
    middle, height = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    above = sum((x - middle) * (y - height) for x, y in points)
    return float(height + above / sum((x - middle) ** 2 for x, _ in points) * (at - middle))


def check_extrapolation(samples: Sequence[int], wanted: int | None) -> None:
    """Raise where there is no line, or where fewer samples take another path."""
    if wanted is not None and (len(set(samples)) < 2 or min(samples) < LEAST_SAMPLES):
        raise ArgumentError(
            f"--extrapolate needs two or more --samples of {LEAST_SAMPLES} at least, not "
            f"{','.join(map(str, samples))}: with fewer, the effects are not measured"
        )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", default="vit_tiny_patch16_224,vit_small_patch16_224",
        help="comma list of timm's (default: %(default)s)")  # fmt: skip
    add("--samples", default="32,64,128", help="comma list (default: %(default)s)")
    add("--extrapolate", type=int, metavar="N",
        help="seconds of so many samples, too, by the line through the measured ones")  # fmt: skip
    add("--categories", default="10,100", help="comma list (default: %(default)s)")
    add("--processes", default="1,2", help="comma list (default: %(default)s)")
    add("--sides", default=",".join(SIDES), help="comma list (default: %(default)s)")
    add("--depth", type=int, default=2, help="blocks, 0 for all (default: %(default)s)")
    add("--size", type=int, default=64, help="pixels of the pictures (default: %(default)s)")
    add("--batch", type=int, default=16, help="pictures at a time (default: %(default)s)")
    add("--output", type=Path, default=results.OUTPUT, metavar="DIR",
        help="folder of the result files (default: %(default)s)")  # fmt: skip
    add("--name", default="scale", help="of the result files (default: %(default)s)")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    sides = asked.sides.split(",")
    if unknown := sorted(set(sides) - set(SIDES)):
        raise ArgumentError(f"There is no side {unknown[0]!r}; there are: {', '.join(SIDES)}.")
    values: dict[str, list[Any]] = {"model": asked.models.split(",")}
    for axis in ("samples", "categories", "processes"):
        values[axis] = [int(number) for number in getattr(asked, axis).split(",")]
    values = {axis: values[axis] for axis in AXES}
    check_extrapolation(values["samples"], asked.extrapolate)
    first = Case(**{axis: along[0] for axis, along in values.items()}, depth=asked.depth,
                 size=asked.size, batch=asked.batch)  # fmt: skip
    path = asked.output / f"{asked.name}.json"

    def write(rows: Rows) -> None:
        found = slopes(rows) if any(len(along) > 1 for along in values.values()) else []
        details = {
            "depth": asked.depth, "size": asked.size, "batch": asked.batch, "slopes": found,
        }  # fmt: skip
        lengths = {row["samples"] for row in rows if row["axis"] == "samples"}
        if asked.extrapolate and lengths == set(values["samples"]):
            rows = [*rows, *extrapolated(rows, asked.extrapolate)]
        results.write(path, TITLE, COLUMNS, rows, seeds=[0], **details)

    rows_of(sides, first, values, write)
    content = results.read(path)
    for columns, table in ((COLUMNS, content["rows"]), (SLOPES, content["slopes"])):
        if table:
            print(f"\n{tables.text_table(columns, table)}")
    print(f"\n{path} written")


if __name__ == "__main__":
    run(main)
