"""The paper's four questions in its six settings, as far as they are missing.

    python benchmarks/paper.py --data DIR --plan                       what would run, and how long
    python benchmarks/paper.py --data DIR --device cuda --minutes 13
    python benchmarks/paper.py --data DIR --device cuda --minutes 13 --resume

A question and setting that has a file among the committed results is done. What is missing is run
piece by piece, first what fills most of the paper's numbers a second, as long as the next piece is
expected to end within `--minutes`. A finished piece is written at once and a trained model is
cached, so that several short runs with `--resume` add up; without it, what `--output` has is
measured anew. Where no piece fits any more, a model is trained for the next run.

The estimates are the seconds of a training step, measured here, times the work of a piece, in the
ratio that the pieces so far took to theirs (`paper-seconds.json` in `--output` has them).

On a GPU models train in bfloat16, channels last, in batches of 512, with the data on the device; on
a CPU for as many epochs in the settings' own batches. RQ3 learns its 1,000 samples in these too.

At the end one table has the paper's number, ours, and which side is ahead: of Figure 5 the points
that it names, of Tables 4 to 6 the means over methods, attacks or tasks. It is written to
`paper.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import rq1, rq2, rq3, rq4
from benchmarks.common import results
from benchmarks.common.data import load
from benchmarks.common.options import add_resume, checked_seeds, common, named, usable_device
from benchmarks.common.settings import Setting, chosen
from benchmarks.common.tables import Cell, Column, text_table
from benchmarks.common.training import trained
from benchmarks.published.adaptation import SETTINGS
from benchmarks.replication.comparison import COLUMNS, comparison
from benchmarks.replication.costs import Ledger, Measured, Subject, sample_seconds
from benchmarks.replication.pieces import QUESTIONS, Piece, missing
from benchmarks.replication.plan import Estimate, Step, planned, run_steps
from benchmarks.replication.recipes import schedule_of, scheduled
from nss_prune.errors import ArgumentError, DataError, NSSPruneError

MAINS: dict[str, Callable[[Sequence[str]], None]] = {
    "rq1": rq1.main, "rq2": rq2.main, "rq3": rq3.main, "rq4": rq4.main,
}  # fmt: skip
PLAN_COLUMNS = (
    Column("piece", "Piece"),
    Column("numbers", "numbers", 0),
    Column("training", "training s", 0),
    Column("seconds", "itself s", 0),
    Column("when", "when"),
)


class Replication:
    """A run of what is missing."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.device = usable_device(asked.device)
        self.kind = torch.device(self.device).type
        self.seeds = checked_seeds(asked.seeds)
        self.settings = [setting.name for setting in chosen(asked.settings)]
        self.ledger = Ledger(asked.output / "paper-seconds.json")
        questions = named(asked.questions, QUESTIONS, "question")
        found = missing(self.settings, asked.output, asked.committed, resume=asked.resume)
        self.pieces = [piece for piece in found if piece.question in questions]
        self.subjects = dict(self._subjects())
        self.trained = {
            piece.model
            for piece in self.pieces
            if piece.setting in self.subjects
            and all(self._subject(piece).is_trained(piece, asked.cache, s) for s in self.seeds)
        }

    def _subjects(self) -> Iterator[tuple[str, Subject]]:
        """The settings of which something is missing and the data is there."""
        wanted = {piece.setting for piece in self.pieces}
        for setting in chosen(",".join(self.settings)):
            if setting.name not in wanted:
                continue
            try:
                yield setting.name, self._measured(setting)
            except DataError as error:
                print(f"{setting.name} is left out: {error}\n", flush=True)

    def _measured(self, setting: Setting) -> Subject:
        setting = scheduled(setting, self.device, self.asked.epochs)
        data = load(setting.data, self.asked.data, cache=self.asked.cache).to(self.device)
        data = data.measured_with(self.asked.evaluated)
        seconds = sample_seconds(setting, data)
        step = setting.recipe.batch * seconds
        epoch = len(data.train) * seconds
        print(
            f"{setting.name}: {step:.3f} s for a step of {setting.recipe.batch} samples, "
            f"{epoch:.1f} s for an epoch, {setting.recipe.epochs} epochs",
            flush=True,
        )
        return Subject(setting, data, seconds)

    def _subject(self, piece: Piece) -> Subject:
        return self.subjects[piece.setting]

    def estimates(self) -> list[Estimate]:
        """Of every missing piece whose data is there."""
        return [self._estimate(piece) for piece in self.pieces if piece.setting in self.subjects]

    def _estimate(self, piece: Piece) -> Estimate:
        subject, models = self._subject(piece), len(self.seeds)
        expected = models * subject.seconds * subject.work(piece)
        factor = self.ledger.factor(piece.question, self.kind)
        return Estimate(piece, factor * expected, models * subject.training(piece))

    def run(self, step: Step) -> float:
        """Run a step; the seconds that it took. What fails is said, and left out."""
        piece = step.estimate.piece
        print(f"\n{piece.name}: about {step.seconds:.0f} s\n", flush=True)
        begin = time.perf_counter()
        try:
            with quick_convolutions():
                self._train(piece)
                if not step.only_training:
                    self._measure(piece)
        except NSSPruneError as error:
            print(f"{piece.name} is left out: {error}", flush=True)
        return time.perf_counter() - begin

    def _train(self, piece: Piece) -> None:
        subject = self._subject(piece)
        setting, data = subject.setting, subject.training_data(piece)
        for seed in self.seeds:
            trained(
                piece.model, setting.build, data, setting.recipe, seed, self.asked.cache,
                self.device,
            )  # fmt: skip

    def _measure(self, piece: Piece) -> None:
        begin = time.perf_counter()
        MAINS[piece.question](self.words(piece))
        seconds = time.perf_counter() - begin
        subject = self._subject(piece)
        expected = len(self.seeds) * subject.seconds * subject.work(piece)
        self.ledger.add(Measured(piece.name, self.kind, seconds, expected))

    def words(self, piece: Piece) -> list[str]:
        """The command line that measures a piece."""
        asked = self.asked
        setting = next(iter(chosen(piece.setting)))
        schedule = schedule_of(setting, self.device, asked.epochs)
        options = {
            "--settings": piece.setting, "--data": asked.data, "--seeds": asked.seeds,
            "--epochs": schedule.epochs, "--batch": schedule.batch, "--evaluated": asked.evaluated,
            "--device": self.device, "--output": asked.output, "--cache": asked.cache,
            "--methods": "all" if piece.question == "rq2" else piece.method,
        }  # fmt: skip
        words = [
            word
            for option, value in options.items()
            if value is not None
            for word in (option, str(value))
        ]
        # The methods of RQ4 come one by one into one file; the others are written whole.
        return [*words, "--resume"] if piece.path(asked.output) in self._grown else words

    @property
    def _grown(self) -> set[Path]:
        return {
            piece.path(self.asked.output)
            for piece in self.pieces
            if piece.method is not None and piece.path(self.asked.output).exists()
        }


@contextlib.contextmanager
def quick_convolutions() -> Iterator[None]:
    """Within the context, cuDNN tries which of its convolutions is fastest for a shape."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        yield


def plan_rows(steps: Sequence[Step], left: Sequence[Estimate]) -> list[dict[str, Cell]]:
    """The pieces in the order in which they would run, then those that would not."""
    when = [(step.estimate, "trains only" if step.only_training else "now") for step in steps]
    trained_only = {estimate.piece for estimate, note in when if note != "now"}
    when += [(one, "later") for one in left if one.piece not in trained_only]
    return [
        {
            "piece": estimate.piece.name,
            "numbers": float(estimate.piece.numbers),
            "training": estimate.training,
            "seconds": estimate.seconds,
            "when": note,
        }
        for estimate, note in when
    ]


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=1)
    add = parser.add_argument
    add("--questions", default="all",
        help=f"comma list of {', '.join(QUESTIONS)}, or all (default)")  # fmt: skip
    add("--minutes", type=float, default=13.0,
        help="no piece begins that would end later (default: %(default)s)")  # fmt: skip
    add("--plan", action="store_true", help="say what would run, and run nothing")
    add("--committed", type=Path, default=results.FOLDER, metavar="DIR",
        help="folder of results that are there already (default: benchmarks/results)")  # fmt: skip
    add_resume(parser)
    parser.set_defaults(settings=",".join(SETTINGS))
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run, or plan, what the command line asks for."""
    asked = parser().parse_args(words)
    begin = time.perf_counter()
    if asked.minutes <= 0:
        raise ArgumentError(f"--minutes is {asked.minutes}; it is a time, above 0.")
    replication = Replication(asked)
    estimates = replication.estimates()
    seconds = 60 * asked.minutes - (time.perf_counter() - begin)
    if asked.plan:
        steps, left = planned(estimates, replication.trained, seconds)
        shown = plan_rows(steps, left)
        print(f"\n{text_table(PLAN_COLUMNS, shown) if shown else 'nothing to run'}")
        return
    run_steps(estimates, replication.trained, seconds, replication.run)
    report(replication)


def report(replication: Replication) -> None:
    """Print and write the table of all that is there."""
    asked = replication.asked
    rows = comparison(replication.settings, (asked.output, asked.committed))
    left = [piece.name for piece in missing(replication.settings, asked.output, asked.committed)]
    path = asked.output / "paper.json"
    results.write(
        path, "The paper's numbers and ours", COLUMNS, rows,
        seeds=list(replication.seeds), device=replication.device, missing=left,
    )  # fmt: skip
    if rows:
        print(f"\n{text_table(COLUMNS, rows)}")
    print(f"\n{path} written; {len(left)} pieces are missing")
