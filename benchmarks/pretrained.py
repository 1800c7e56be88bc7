"""Pretrained timm models from a file of weights, pruned without training, beside published figures.

    python benchmarks/pretrained.py --model deit_base_patch16_224 --weights FILE --data DIR

The weights are timm's for ImageNet (.safetensors, .pth or .bin). Of the pictures in DIR (see
benchmarks/common/data.py), `--calibrated` are drawn by each seed and the half that is for tests
measures. What is pruned:

    mlp     the hidden channels of all MLPs, to a share of their number over all layers together
    heads   the dimensions inside heads likewise: one number for queries, keys and values, where
            the published figure is of queries and keys alone
    both    the one and then the other
    model   everything, to a share of the multiply-accumulates

Published figures are of the 50,000 pictures that validate ImageNet, and ours of what DIR has: the
points that are lost compare, the accuracies only where DIR has them all.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.board.pruning import by_channel
from benchmarks.common import results, tables
from benchmarks.common.data import Split, load
from benchmarks.common.options import checked_seeds, common, run, usable_device
from benchmarks.common.tables import Cell, Column, spread
from benchmarks.common.training import predictions, share_equal, suitable_threads
from nss_prune import NSSPruner
from nss_prune.errors import ArgumentError, DataError
from nss_prune.graph.costs import measure as cost_of
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.pruner.subject import Subject

BATCH = 50
COLUMNS = (
    Column("what", "pruned"), Column("kept", "kept"), Column("macs", "MACs kept %", 1),
    Column("whole", "whole model, %"), Column("left", "left, %"), Column("lost", "lost, points"),
    Column("published", "published: lost, points"), Column("source", "by"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way of pruning a model, and what its papers lose with it.

    what: "mlp", "heads", "both" or "model".   kept: share of these neurons, or of the MACs.
    published: points lost, by the paper's own figures.   source: whose they are.
    """

    model: str
    what: str
    kept: float
    published: float | None = None
    source: str = ""


DEIT, CONVNEXT, SWIN = "deit_base_patch16_224", "convnext_tiny", "swin_tiny_patch4_window7_224"
SIZES = (DEIT, "deit_tiny_patch16_224", "deit_small_patch16_224", "deit3_large_patch16_224")
ROWS = (
    Row(DEIT, "heads", 0.5, 0.94, "CORP, queries and keys"),
    Row(DEIT, "mlp", 0.5, 81.74 - 72.00, "CORP"),
    Row(DEIT, "mlp", 0.5, 81.74 - 66.40, "VBP, order by variance with mean shift"),
    *(Row(name, "mlp", kept) for name in SIZES for kept in (0.8, 0.45)),
    *(Row(name, "heads", 0.5) for name in SIZES[1:]),
    *(Row(name, "both", 0.5) for name in SIZES),
    Row(SWIN, "mlp", 0.5),
    Row(SWIN, "heads", 0.5),
    Row(CONVNEXT, "mlp", 0.5, 82.1 - 16.8, "VBP"),
    Row("resnet50", "model", 1 / 1.73, 76.13 - 72.58, "PSP"),
)


class Neurons:
    """A cost: how many neurons of a kind are kept."""

    def __init__(self, is_of_kind: Callable[[NeuronGroup], bool]) -> None:
        self._is_of_kind = is_of_kind

    name = "neurons"

    def of(self, subject: Subject) -> Callable[[Slice], float]:
        """Of a slice of the subject."""
        names = [group.name for group in subject.groups if self._is_of_kind(group)]
        return lambda critical: float(sum(int(critical.kept[name].sum()) for name in names))


def in_mlp(group: NeuronGroup) -> bool:
    """Whether its neurons are the hidden channels of one of timm's MLPs."""
    return group.name.endswith("mlp.fc1")


def in_heads(group: NeuronGroup) -> bool:
    """Whether its neurons are dimensions inside heads."""
    return group.is_inside_heads


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of timm's weights.

    Raises:
        DataError: There is no such file, or it is of another model.
    """
    if not path.is_file():
        raise DataError(f"there is no {path}; --weights takes a file of timm's weights")
    if path.suffix == ".safetensors":
        content: Any = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        content = content.get(key, content)
    try:
        model.load_state_dict(content)
    except RuntimeError as error:
        raise DataError(f"{path} has the weights of another model: {error}") from error


def pruned(model: nn.Module, row: Row, batches: Sequence[tuple[Tensor, Tensor]]) -> nn.Module:
    """A smaller copy of the model."""
    smaller, example = copy.deepcopy(model), batches[0][0][:2]
    common: dict[str, Any] = {"data": batches, "progress": False}
    if row.what == "model":
        NSSPruner(smaller, example, macs_budget=row.kept, **common).step()
    if row.what in ("heads", "both"):
        groups = NSSPruner(smaller, example, params_budget=0.5, fold=False).neurons.groups
        ignored = [group.name for group in groups if group.has_channels]
        NSSPruner(smaller, example, budget=row.kept, cost=Neurons(in_heads), round_to=1,
                  ignored_layers=ignored, **common).step()  # fmt: skip
    if row.what in ("mlp", "both"):
        groups = NSSPruner(smaller, example, params_budget=0.5, fold=False).neurons.groups
        ignored = [group.name for group in groups if not in_mlp(group)]
        NSSPruner(smaller, example, budget=row.kept, cost=Neurons(in_mlp), round_to=1,
                  ignored_layers=ignored, **common).step()  # fmt: skip
    return by_channel(smaller)


def measure(model: nn.Module, row: Row, calibrating: Split, test: Split) -> dict[str, float]:
    """Column -> value, of one draw of pictures."""
    batches = list(calibrating.batches(BATCH))
    smaller = pruned(model, row, batches)
    whole, left = (
        100 * share_equal(predictions(one, test, BATCH), test.labels) for one in (model, smaller)
    )
    macs = [cost_of(one, batches[0][0][:1]).macs for one in (model, smaller)]
    return {"macs": 100 * macs[1] / macs[0], "whole": whole, "left": left, "lost": whole - left}


def rows_of(
    model: nn.Module, rows: Sequence[Row], pool: Split, test: Split, seeds: Sequence[int],
    calibrated: int,
) -> list[dict[str, Cell]]:  # fmt: skip
    """The table, with the spread over the draws; prints a line on each cell."""
    if calibrated > len(pool):
        raise ArgumentError(f"--calibrated is {calibrated}, and {len(pool)} pictures are there")
    table: list[dict[str, Cell]] = []
    for row in rows:
        found = []
        for seed in seeds:
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
            found.append(measure(model, row, pool.subset(order[:calibrated]), test))
            print(f"{row.what} {row.kept:.2f}, seed {seed}: {found[-1]}", flush=True)
        cells: dict[str, Cell] = {"what": row.what, "kept": f"{row.kept:.2f}"}
        cells.update({name: spread([one[name] for one in found]) for name in found[0]})
        cells.update({"published": row.published, "source": row.source})
        table.append(cells)
    return table


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = common(__doc__, seeds=3)
    add = parser.add_argument
    known = dict.fromkeys(row.model for row in ROWS)
    add("--model", required=True, help=f"timm's name: {', '.join(known)}, or another of its kind")
    add("--weights", type=Path, required=True, metavar="FILE", help="its weights, as timm has them")
    add("--what", help="mlp, heads, both or model, to half (default: the rows of the model)")
    add("--calibrated", type=int, default=500, metavar="N",
        help="pictures that a seed draws to calibrate (default: %(default)s)")  # fmt: skip
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    rows = [row for row in ROWS if row.model == asked.model]
    if asked.what:
        rows = [Row(asked.model, asked.what, 0.5)]
    if not rows:
        raise ArgumentError(f"{asked.model} has no rows; say what to prune with --what")
    seeds, device = checked_seeds(asked.seeds), usable_device(asked.device)
    model = timm.create_model(asked.model)
    load_weights(model, asked.weights)
    model = by_channel(model).to(device).eval()
    data = load("imagenet", asked.data, cache=asked.cache).to(device).measured_with(asked.evaluated)
    pool, test = (as_trained(model, split) for split in (data.train, data.test))
    with suitable_threads(model):
        table = rows_of(model, rows, pool, test, seeds, asked.calibrated)
    path = asked.output / f"pretrained-{asked.model}.json"
    results.write(path, f"Pretrained, {asked.model}", COLUMNS, table, seeds=seeds, device=device,
                  options={"calibrated": asked.calibrated, "data": data.origin})  # fmt: skip
    print(f"\n{tables.text_table(COLUMNS, table)}\n\n{path} written\n")


def as_trained(model: Any, split: Split) -> Split:
    """The pictures normalised as the model was trained with."""
    known = model.pretrained_cfg
    mean, std = (255 * torch.tensor(known[key]).view(3, 1, 1) for key in ("mean", "std"))
    return replace(split, mean=mean.to(split.mean), std=std.to(split.std))


if __name__ == "__main__":
    run(main)
