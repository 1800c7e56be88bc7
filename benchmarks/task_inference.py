"""RQ4 where the task of a sample is not given: what infers it best.

    python benchmarks/task_inference.py                                a minute, no download
    python benchmarks/task_inference.py --settings mlp-mnist,mlp-fmnist --tasks 2,5 --data DIR

A model learns its tasks as in `rq4.py`, by neusemslice and neusemslice-settled. Each test sample is
then answered by the task that `trainer.predict(inputs, by=...)` infers: by "entropy", "energy",
"features" or "both" (see nss_prune/adaptation/task_inference.py). The columns are the share of
samples that are named rightly, mean over tasks, and bytes kept for a task's features.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch import nn

from benchmarks.common.data import Data, load
from benchmarks.common.options import (
    add_resume,
    checked_seeds,
    common,
    named,
    run,
    usable_device,
)
from benchmarks.common.record import Record, Tables
from benchmarks.common.settings import Setting, chosen
from benchmarks.common.tables import Cell, Column, spread, text_table
from benchmarks.common.training import suitable_threads, trained
from benchmarks.learners.course import PROFILED, Course, Subtask
from benchmarks.learners.methods import METHODS
from benchmarks.learners.semantic import NonCriticalNeurons
from benchmarks.rq4 import accuracy_given, split_tasks
from nss_prune.adaptation.task_inference import Score
from nss_prune.errors import ArgumentError

SCORES: tuple[Score, ...] = get_args(Score)
LEARNED_BY = ("neusemslice", "neusemslice-settled")


@dataclass(frozen=True)
class Inferred:
    """What is named rightly. Accuracies are shares, 0 to 1.

    given: where the task of a sample is given.   by_score: where it is inferred.
    storage: bytes of a task's features, mean.
    """

    method: str
    tasks: int
    seed: int
    given: float
    by_score: dict[str, float]
    storage: float


def identity(entry: Inferred) -> tuple[str, int, int]:
    return entry.method, entry.tasks, entry.seed


def tables(entries: Sequence[Inferred]) -> Tables:
    """A row for each method and number of tasks, mean ± deviation over models."""
    columns = [
        Column("tasks", "tasks", 0),
        Column("method", "Method"),
        Column("given", "task given %"),
        *[Column(score, f"by {score} %") for score in SCORES],
        Column("ahead", "both ahead of entropy, points"),
        Column("storage", "bytes a task", 0),
    ]
    rows = []
    for tasks, method in sorted({(entry.tasks, entry.method) for entry in entries}):
        found = [entry for entry in entries if (entry.tasks, entry.method) == (tasks, method)]
        row: dict[str, Cell] = {"tasks": tasks, "method": METHODS[method][0]}
        row["given"] = spread([100 * entry.given for entry in found])
        for score in SCORES:
            row[score] = spread([100 * entry.by_score[score] for entry in found])
        row["ahead"] = spread(
            [100 * (entry.by_score["both"] - entry.by_score["entropy"]) for entry in found]
        )
        row["storage"] = spread([entry.storage for entry in found])
        rows.append(row)
    return Tables(columns, rows)


def inferred(method: str, model: nn.Module, tasks: Sequence[Subtask], course: Course) -> Inferred:
    """What a method makes of a copy of `model`."""
    with suitable_threads(model):
        _, make = METHODS[method]
        learner = make(copy.deepcopy(model), tasks[0], course, len(tasks))
        for task in tasks[1:]:
            learner.learn(task)
        assert isinstance(learner, NonCriticalNeurons)
        given = [accuracy_given(learner, i, task) for i, task in enumerate(tasks)]
        shares: dict[str, float] = {score: accuracy(learner, tasks, score) for score in SCORES}
    sizes = [task.features.nbytes for task in learner.trainer.tasks if task.features is not None]
    return Inferred(
        method, len(tasks), course.seed, statistics.fmean(given), shares, statistics.fmean(sizes)
    )


def accuracy(learner: NonCriticalNeurons, tasks: Sequence[Subtask], score: Score) -> float:
    """The share of the test samples that is named rightly, mean over tasks."""
    shares = []
    for task in tasks:
        right = sum(
            int((learner.trainer.predict(inputs, by=score) == labels).sum())
            for inputs, labels in task.data.test.batches(500)
        )
        shares.append(right / len(task.data.test))
    return statistics.fmean(shares)


def missing(
    setting: Setting, data: Data, asked: argparse.Namespace, record: Record[Inferred]
) -> Iterator[Inferred]:
    """What the record lacks of a setting."""
    for count in counts(asked.tasks):
        tasks = split_tasks(data, count)
        for seed in checked_seeds(asked.seeds):
            wanted = named(asked.methods, LEARNED_BY, "method")
            wanted = [method for method in wanted if (method, count, seed) not in record]
            if not wanted:
                continue
            first = tasks[0].data
            device = first.train.labels.device
            name = f"{setting.name}-1of{count}"
            made = trained(name, setting.build, first, setting.recipe, seed, asked.cache, device)
            course = Course(setting.recipe, seed, "method", max(setting.profiled, PROFILED))
            for method in wanted:
                found = inferred(method, made.model, tasks, course)
                shown = ", ".join(f"by {s} {100 * found.by_score[s]:.2f}" for s in SCORES)
                print(f"{count} tasks, seed {seed}, {method}: {shown}", flush=True)
                yield found


def counts(words: str) -> list[int]:
    """The numbers of tasks that a comma-separated list names."""
    found = [int(word) for word in named(words, ("2", "5"), "number of tasks")]
    return sorted(set(found))


def parser() -> argparse.ArgumentParser:
    made = common(__doc__, seeds=3)
    add = made.add_argument
    add("--tasks", default="2,5", help="comma list of 2 and 5 (default: %(default)s)")
    add("--methods", default="all", help=f"comma list of {', '.join(LEARNED_BY)}, or all")
    add_resume(made)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    device = usable_device(asked.device)
    for setting in chosen(asked.settings):
        setting = setting.with_epochs(asked.epochs)
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        options = {
            "recipe": asdict(setting.recipe), "profiled": max(setting.profiled, PROFILED),
            "evaluated": asked.evaluated, "data": data.origin,
        }  # fmt: skip
        record = Record(
            asked.output / f"task-inference-{setting.name}.json",
            f"Task inference, {setting.name}", Inferred, identity, tables, options, device,
        )  # fmt: skip
        if asked.resume:
            record.resume()
        for found in missing(setting, data, asked, record):
            record.add([found])
            record.save()
        if not record.entries:
            raise ArgumentError("nothing was measured; give --seeds, --tasks and --methods")
        shown = record.tables(record.entries)
        print(f"\n{record.title}; data: {data.origin}\n")
        print(text_table(shown.columns, shown.rows))


if __name__ == "__main__":
    run(main)
