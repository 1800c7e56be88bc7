"""The accuracy board: what every criterion leaves of a model's accuracy, without any training.

    python benchmarks/accuracy.py                                      a minute, no download
    python benchmarks/accuracy.py --settings mlp-mnist,alexnet-cifar10 --data DIR

Every criterion prunes the same trained model through NSSPruner, to the same share of its
multiply-accumulates (or of its parameters). What is left is measured on pictures that calibrated
nothing. A seed draws the pictures that calibrate; model and test pictures stay the same. With
`--redraw` a pretrained model's test pictures are drawn anew as well, which there is more to learn
from where pictures are few. With `--models` each seed has a model of its own, trained with that
seed: pictures that one model happens to get right after a light cut say little of the next.

    magnitude-l1, magnitude-l2, bn-scale, lamp, fpgm, taylor, hessian, random
                torch-pruning's, with its defaults, as `importance=`; gradients from the
                calibration data with labels
    semantic    the paper's: 1 - the entry threshold of each neuron, `strategy="semantic"`
    vbp, corp   variance and energy of activations, see benchmarks/rivals
    divergence  NSSPruner's default for a budget with data: the order, and how many go of each layer
    divergence-whole-heads
                the same with `prune_head_dims=False`, for transformers; "all" leaves it out

All but the last two rank neurons, and how many go of each layer is a question of its own:

    local       the same share of each layer
    global      one threshold for all layers; with `semantic` this is one theta, the paper's rule

And what is removed is made up for in several ways, the kinds:

    plain                fold=False: the neurons are removed
    recalibrated         fold=False, recalibrate=True
    folded               NSSPruner as it is, fold=True
    folded-recalibrated  both
    refit                fold="refit", which takes a pass for each layer
    own                  what VBP and CORP bring themselves: mean shift, ridge on what remains
    folded-balanced, folded-recalibrated-balanced, refit-balanced
                         and balance=True
    plain-tuned          `plain`, then trained on all training data for `--tuned-epochs`, at a
                         tenth of the learning rate that the model was trained with
    folded-tuned, own-tuned
                         `folded` and `own`, then trained in the same way

What is left is measured by its accuracy, by the largest share of its samples that a class loses,
and by its agreement with the whole model: the share of test pictures that get the same class. If
a cut costs hardly any accuracy, the best of many criteria is one that happens to be right more
often than the whole model; agreement tells what a cut changed from what it happened to gain.

`efficientnet-imagenet` prunes the hidden channels of the inverted bottlenecks alone, to a share of
their own multiply-accumulates, a `cost=` of its own; `efficientnet-imagenet-whole` all that can be
pruned. Where a criterion cannot reach a budget (bn-scale leaves layers without BatchNorm alone, vbp
and corp all but hidden layers), the cell is empty. The result file is saved after every cell, and a
run that was stopped goes on from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace

from benchmarks.board.boards import BOARDS, Board, levels
from benchmarks.board.cells import (
    ALL_CRITERIA,
    ALLOCATIONS,
    CRITERIA,
    KINDS,
    Measured,
    chosen_variants,
)
from benchmarks.board.plot import plot
from benchmarks.board.run import Plan, place, run_board
from benchmarks.board.tables import (
    AGREEMENT_COLUMNS,
    SUMMARY_COLUMNS,
    agreements,
    board_tables,
    columns,
    summary,
    table_rows,
)
from benchmarks.common.data import Data, load
from benchmarks.common.options import checked_seeds, common, in_order, usable_device
from benchmarks.common.record import Record
from benchmarks.common.tables import text_table
from nss_prune.errors import ArgumentError


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common(None, seeds=3)], conflict_handler="resolve",
    )  # fmt: skip
    add = parser.add_argument
    add("--settings", default="mlp-digits",
        help=f"comma list of {', '.join(BOARDS)}, or all (default: %(default)s)")  # fmt: skip
    add("--seeds", type=int, default=3, metavar="N",
        help="draws of the pictures that calibrate (default: %(default)s)")  # fmt: skip
    add("--criteria", default="all",
        help=f"comma list of {', '.join(ALL_CRITERIA)}; all: those before the last "
        "(default: %(default)s)")  # fmt: skip
    add("--allocations", default="all",
        help=f"comma list of {', '.join(ALLOCATIONS)}, or all (default: %(default)s)")  # fmt: skip
    add("--kinds", default="plain,recalibrated,folded,folded-recalibrated,own",
        help=f"comma list of {', '.join(KINDS)}, or all (default: %(default)s)")  # fmt: skip
    add("--kept", metavar="SHARES",
        help="comma list of shares of the MACs to keep (default: the setting's)")  # fmt: skip
    add("--kept-parameters", metavar="SHARES",
        help="comma list of shares of the parameters to keep (default: the setting's)")  # fmt: skip
    add("--calibrated", type=int, metavar="N",
        help="pictures that a seed draws to calibrate (default: the setting's)")  # fmt: skip
    add("--tuned-epochs", type=int, default=Board.tuned_epochs, metavar="N",
        help="epochs of training for the kinds that are tuned (default: %(default)s)")  # fmt: skip
    add("--redraw", action="store_true",
        help="draw the test pictures anew with each seed, for pretrained models")  # fmt: skip
    add("--mirrored", action="store_true",
        help="calibrate with mirror images, too, which is a board of its own")  # fmt: skip
    add("--models", action="store_true",
        help="a model of its own for each seed, which is a board of its own")  # fmt: skip
    add("--fresh", action="store_true", help="start anew, whatever the result file has")
    return parser


def adapted(board: Board, asked: argparse.Namespace) -> Board:
    """The board as the command line wants it."""
    given = [("MACs", asked.kept), ("parameters", asked.kept_parameters)]
    wanted = [level for of, words in given if words for level in levels(of, *numbers(words))]
    calibrated = board.calibrated if asked.calibrated is None else asked.calibrated
    if calibrated < 2:
        raise ArgumentError(f"--calibrated is {calibrated}; at least 2 pictures are needed.")
    setting = board.setting.with_epochs(asked.epochs)
    if asked.redraw and setting.recipe.epochs:
        raise ArgumentError(
            f"--redraw would check {board.name} with pictures that it was trained with; it is for "
            "pretrained models."
        )
    if asked.models and not setting.recipe.epochs:
        raise ArgumentError(f"--models trains one for each seed; {board.name} is a pretrained one.")
    if asked.tuned_epochs < 1:
        raise ArgumentError(f"--tuned-epochs is {asked.tuned_epochs}; it is 1 or more.")
    new_levels = tuple(wanted) or board.levels
    return replace(
        board, name=board.name + "-mirrored" * asked.mirrored + "-models" * asked.models,
        setting=setting, calibrated=calibrated, levels=new_levels, tuned_epochs=asked.tuned_epochs,
        mirrored=asked.mirrored, models=asked.models,
    )  # fmt: skip


def numbers(words: str) -> list[float]:
    """The numbers of a comma list."""
    try:
        return [float(word) for word in words.split(",")]
    except ValueError as error:
        raise ArgumentError(f"{words!r} is no comma list of numbers, such as 0.9,0.8.") from error


def record_of(board: Board, data: Data, asked: argparse.Namespace, device: str) -> Record[Measured]:
    """The record of a board, with what its file has unless that is to be forgotten."""
    options = {
        "calibrated": board.calibrated, "evaluated": asked.evaluated, "redraw": asked.redraw,
        "recipe": asdict(board.setting.recipe), "tuned": asdict(board.tuned),
        "data": data.origin,
    }  # fmt: skip
    record = Record(
        asked.output / f"accuracy-{board.name}.json", f"Accuracy board, {board.name}", Measured,
        place, board_tables, options, device, key="cells",
    )  # fmt: skip
    if not asked.fresh:
        record.resume()
    return record


def report(record: Record[Measured], data: Data) -> None:
    """Print the tables of a board, and draw its plot."""
    cells = record.entries
    if not cells:
        print(f"{record.title}: none of the criteria ranks the neurons")
        return
    record.save()
    image = record.path.with_suffix(".png")
    plot(record.title, cells, image)
    print(f"\n{record.title}; data: {data.origin}; accuracy %, mean ± deviation over seeds\n")
    print(text_table(columns(cells), table_rows(cells)))
    if gains := summary(cells):
        print(f"\n{text_table(SUMMARY_COLUMNS, gains)}")
    if agreeing := agreements(cells):
        print("\nagreement with the whole model, %\n")
        print(text_table(AGREEMENT_COLUMNS, agreeing))
    print(f"\n{record.path} and {image.name} written\n")


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    seeds, device = checked_seeds(asked.seeds), usable_device(asked.device)
    kinds = in_order(asked.kinds, KINDS, "kind")
    wanted = ",".join(CRITERIA) if asked.criteria == "all" else asked.criteria
    criteria = in_order(wanted, ALL_CRITERIA, "criterion")
    variants = list(
        chosen_variants(criteria, in_order(asked.allocations, ALLOCATIONS, "allocation"))
    )
    names = in_order(asked.settings, BOARDS, "setting")
    for board in [adapted(BOARDS[name], asked) for name in names]:
        data = load(board.setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        record = record_of(board, data, asked, device)
        plan = Plan(board, variants, kinds, seeds, asked.redraw, asked.cache)
        run_board(plan, record, data)
        report(record, data)
