"""How many architectures can be pruned, and what that costs: torch-pruning and NSSPruner.

    python benchmarks/coverage.py                        all, hours on two cores; goes on if stopped
    python benchmarks/coverage.py --models convnext_atto,torchvision:resnet18
    python benchmarks/coverage.py --fresh --sides nss_prune
    python benchmarks/coverage.py --suite detection      or transformers, segmentation, timm ...

The models are the smallest, by parameters, of every timm module and of every classifier
architecture of torchvision, with random weights. Each is pruned by each side, torch-pruning's
standard recipe and NSSPruner, in a process of its own with a time limit. A side is through with a
model when the model has fewer parameters and the same output shape, computes what the masked model
does (NSSPruner checks that before it commits; the recipe of torch-pruning has no masked model),
takes a training step's backward pass, and can be exported. A backward pass or an export that fails
before pruning, too, is noted and held against neither side; a model that does not run before
pruning is excluded on both.

NSSPruner allocates its budget from `--samples` random pictures, in batches of 32 and as small as
the model takes them. Beside the seconds of that allocation stand those of bare forward and backward
passes over the same pictures, and the memory that it takes at most beyond what was held before it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.architectures.models import SOURCES, SUITES, Model, model_named
from benchmarks.architectures.outcomes import (
    CAUSES,
    COSTS,
    OURS,
    SIDES,
    THEIRS,
    TOTALS,
    Outcome,
    causes,
    costs,
    excluded,
    lost,
    totals,
)
from benchmarks.architectures.sides import PRUNE
from benchmarks.architectures.state import SCRIPT, State, measure, outcome_of
from benchmarks.architectures.trial import SAMPLES, Trial
from benchmarks.common import results
from benchmarks.common.tables import text_table
from nss_prune.errors import ArgumentError

LIMITS = {THEIRS: 120.0, OURS: 900.0}  # ours sees more pictures


def run_one(model: Model, side: str, asked: argparse.Namespace) -> Outcome:
    """The outcome of a process that tries one model on one side."""
    limit = limit_of(side, asked)
    words = [sys.executable, str(SCRIPT), "--one", side, str(model), "--limit", str(limit)]
    words += ["--samples", str(asked.samples)]
    words += [] if asked.pixels is None else ["--pixels", str(asked.pixels)]
    words += [] if asked.theta is None else ["--theta", str(asked.theta)]
    return outcome_of(words, model, side, limit)


def limit_of(side: str, asked: argparse.Namespace) -> float:
    """Seconds for one model."""
    return float(LIMITS[side] if asked.limit is None else asked.limit)


def report(state: State) -> None:
    """Print what the result file says."""
    outcomes = state.record.entries
    print(f"\n{text_table(TOTALS, [totals(outcomes, side) for side in SIDES])}")
    if rows := costs(outcomes):
        print(f"\n{text_table(COSTS, rows)}")
    if rows := causes(outcomes):
        print(f"\n{text_table(CAUSES, rows)}")
    for model, cause in sorted(excluded(outcomes).items()):
        print(f"\nexcluded, does not run before pruning: {model}: {cause}")
    for family in state.not_created():
        print(f"\nno model can be created: {family}")
    names = ", ".join(lost(outcomes)) or "none"
    print(f"\nfamilies that {THEIRS} prunes and {OURS} does not: {names}")
    print(f"\n{state.path} written")


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    limits = ", ".join(f"{limit:g} for {side}" for side, limit in LIMITS.items())
    add = parser.add_argument
    add("--models", metavar="NAMES", help="comma list (default: the smallest of every family)")
    add("--suite", choices=SUITES, help="these models alone, with a result file of their own")
    add("--families", default=",".join(SOURCES), help="comma list (default: %(default)s)")
    add("--sides", default=",".join(SIDES), help="comma list (default: %(default)s)")
    add("--samples", type=int, default=SAMPLES, metavar="N",
        help="pictures that an allocation sees (default: %(default)s)")  # fmt: skip
    add("--pixels", type=int, metavar="N",
        help="their height (default: the least of 64, 128, its own that works)")  # fmt: skip
    add("--limit", type=float, metavar="SECONDS",
        help=f"for one model on one side (default: {limits})")  # fmt: skip
    add("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    add("--output", type=Path, default=results.OUTPUT, metavar="DIR",
        help="folder of the result file (default: %(default)s)")  # fmt: skip
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", dest="fresh", action="store_false", default=False,
        help="keep the outcomes in the result file (the default)")  # fmt: skip
    again.add_argument("--fresh", action="store_true",
        help="forget those of the models and sides that are asked for")  # fmt: skip
    add("--one", nargs=2, metavar=("SIDE", "NAME"), help="try one model and print its outcome")
    add("--theta", type=float, help=argparse.SUPPRESS)
    return parser


def listed(words: str, option: str, known: Sequence[str]) -> list[str]:
    """A comma list of known words."""
    found = words.split(",")
    for word in found:
        if word not in known:
            raise ArgumentError(f"{option} has {word!r}; there are: {', '.join(known)}.")
    return found


def print_one(asked: argparse.Namespace) -> None:
    """Try one model on one side in this process, and print the outcome as JSON."""
    word, name = asked.one
    (side,) = listed(word, "--one", SIDES)
    trial = Trial(
        side, model_named(name), limit_of(side, asked), asked.samples, asked.pixels, asked.theta
    )
    print(json.dumps(asdict(trial.run(PRUNE[side]))))


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    if asked.samples < 2:
        raise ArgumentError(f"--samples is {asked.samples}; at least 2 pictures are needed.")
    if asked.one:
        print_one(asked)
        return
    options = {"samples": asked.samples, "pixels": asked.pixels}
    sides = listed(asked.sides, "--sides", SIDES)
    sources = [asked.suite] if asked.suite else listed(asked.families, "--families", SOURCES)
    file = f"coverage-{asked.suite}.json" if asked.suite else "coverage.json"
    named = [model_named(word) for word in asked.models.split(",")] if asked.models else None
    state = State.load(asked.output / file, options)
    models = state.models(sources) if named is None else named
    if asked.fresh:
        state.forget(models, sides)
    measure(state, models, sides, lambda model, side: run_one(model, side, asked), asked.jobs)
    report(state)
