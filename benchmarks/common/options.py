"""The command line that the scripts share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from benchmarks.common import results
from benchmarks.common.settings import SETTINGS
from benchmarks.common.storage import DEFAULT_CACHE
from nss_prune.errors import ArgumentError, NSSPruneError
from nss_prune.profiling.contributions.protocol import metrics_known


def common(description: str | None, *, seeds: int) -> argparse.ArgumentParser:
    """A parser with the options of every script that trains models; `seeds` is the default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--settings", default="mlp-digits",
        help=f"comma list of {', '.join(SETTINGS)}, or all (default: %(default)s)")  # fmt: skip
    add("--data", type=Path, metavar="DIR",
        help="folder of the data sets (default: data/ in the cache, downloaded)")  # fmt: skip
    add("--seeds", type=int, default=seeds, metavar="N",
        help="models per setting (default: %(default)s)")  # fmt: skip
    add("--epochs", type=int, metavar="N", help="epochs of training (default: the setting's)")
    add("--evaluated", type=int, metavar="N",
        help="check and test samples of each category to measure with (default: all)")  # fmt: skip
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--output", type=Path, default=results.OUTPUT, metavar="DIR",
        help="folder of the result files (default: %(default)s)")  # fmt: skip
    add("--cache", type=Path, default=DEFAULT_CACHE, metavar="DIR",
        help="folder of trained models and pictures (default: ~/.cache/nss_prune)")  # fmt: skip
    return parser


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """The option --metrics, for scripts that compare them."""
    parser.add_argument("--metrics", default=",".join(metrics_known()),
        help="comma list of contribution metrics (default: %(default)s)")  # fmt: skip


def add_batch(parser: argparse.ArgumentParser) -> None:
    """The option --batch, for scripts whose models may train in other batches."""
    parser.add_argument("--batch", type=int, metavar="N",
        help="samples of a training step (default: the setting's)")  # fmt: skip


def add_resume(parser: argparse.ArgumentParser) -> None:
    """The option --resume, for scripts that write their results model by model."""
    parser.add_argument("--resume", action="store_true",
        help="keep what the result file has, and measure what it lacks")  # fmt: skip


def named(names: str, known: Collection[str], kind: str) -> list[str]:
    """What a comma-separated list names ("all": everything known)."""
    wanted = list(known) if names == "all" else names.split(",")
    for name in wanted:
        if name not in known:
            raise ArgumentError(f"There is no {kind} {name!r}; there are: {', '.join(known)}.")
    return wanted


def in_order(names: str, known: Collection[str], kind: str) -> list[str]:
    """What a comma-separated list names ("all": everything known), in the order known."""
    wanted = named(names, known, kind)
    return [name for name in known if name in wanted]


def checked_seeds(count: int) -> Sequence[int]:
    """The seeds 0 .. count - 1."""
    if count < 1:
        raise ArgumentError(f"--seeds is {count}; it is the number of models, at least 1.")
    return range(count)


def usable_device(name: str) -> str:
    """The device `name`, if something can be put on it: before any work, not after."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"--device {name} cannot be used here: {reason}") from error
    return name


def run(main: Callable[[], None]) -> None:
    """Call a script's main function; an error of the package ends it with one line."""
    try:
        main()
    except NSSPruneError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
