"""RQ4, incremental development: learn task B and keep task A (Table 6).

    python benchmarks/rq4.py                                           a minute, no download
    python benchmarks/rq4.py --settings mlp-mnist,mlp-fmnist --data DIR --seeds 5
    python benchmarks/rq4.py --settings mlp-mnist --data DIR --tasks 5

The ten classes are split into tasks, in order: A is classes 0 to 4 and B 5 to 9, or with
`--tasks 5` two classes each. For every setting and seed a model is trained on task A (or taken
from the cache). From it each method learns the next tasks, by the same recipe (epochs, optimiser,
learning rates, augmentation):

    original               learns nothing more
    retrain                trains everything on the new task alone
    replay-5, -10, -100    the same with that share (%) of the earlier tasks' data among it
    deeparc                trains the layers that DeepArc finds redundant, alone
    packnet                PackNet: see packnet.py
    hat                    HAT: see hat.py. Its gates must be trained with task A, so that it learns
                           this once more from the model that the others start with
    neusemslice            trains what is not critical to the earlier tasks, without their data
    neusemslice-replay-10  the same, with 10 % of it
    neusemslice-settled    the same without, but each task takes as many neurons of every layer as
                           make an equal share of the parameters, which train for half as many
                           epochs again under their mask, as PackNet's weights do
    neusemslice-lamp       settled as well, in a part of the weights of more neurons: those neurons
                           of every layer that make the square root of an equal share of the
                           parameters, and of their weights the best by LAMP, as many as half of an
                           equal share
    packnet-long, neusemslice-settled-long, neusemslice-lamp-long
                           these three, where a task trains for as many epochs again: with two
                           tasks, on as many samples as replay-100

The columns are

    task A, B  test accuracy once the last task is learned. Which task a sample belongs to is given:
               for every method the outputs of its task compete. Earlier tasks use their masks where
               a method has them (NeuSemSlice, PackNet, HAT); the last task (not of HAT, where it
               has its own mask), and all tasks of the other methods, use the whole network
    average    of the tasks
    forgetting points that a task lost since it was learned, mean over all but the last; of task A
               against the whole network, so that what its mask costs is included
    not given  average where the task of a sample is not given: all outputs of the whole network
               compete, as the paper must have measured retraining and replay (its task A falls to
               0). PackNet, HAT, and NeuSemSlice without replay, keep their tasks apart: of these
               the mask answers whose outputs have the least entropy
    bytes      to be kept for task A beside the model: a mask, samples to replay

The loss is the cross entropy of all outputs, as a network that answers without being given the
task needs it; of those of the task for methods that keep tasks apart (`--loss` asks for one of
them). PackNet trains on task A for half as many epochs again, after it is pruned, as its authors
do, and so does NeuSemSlice where it settles.

NeuSemSlice slices by the trainer's own rules, from data of each task alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import get_args

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.common.data import Data, Split, load
from benchmarks.common.options import (
    add_batch,
    add_resume,
    checked_seeds,
    common,
    named,
    run,
    usable_device,
)
from benchmarks.common.record import Record
from benchmarks.common.settings import Setting, chosen
from benchmarks.common.tables import text_table
from benchmarks.common.training import fast, suitable_threads, trained
from benchmarks.learners.course import CLASSES, PROFILED, Competition, Course, Subtask
from benchmarks.learners.methods import METHODS
from benchmarks.learners.plain import Learner
from benchmarks.reports.rq4 import SUMMARY_COLUMNS, Outcome, identity, plot, tables
from nss_prune.errors import ArgumentError, NothingToPruneError


def split_tasks(data: Data, count: int) -> list[Subtask]:
    """The classes in `count` tasks of as many, in order.

    Raises ArgumentError for a data set of other than ten classes.
    """
    found = int(data.train.labels.max()) + 1
    if found != CLASSES:
        raise ArgumentError(f"{data.name} has {found} classes; RQ4 splits {CLASSES} into tasks.")
    return [Subtask(part, only(data, part)) for part in class_groups(count)]


def class_groups(count: int) -> list[tuple[int, ...]]:
    size = CLASSES // count
    return [tuple(range(start, start + size)) for start in range(0, CLASSES, size)]


def only(data: Data, classes: Sequence[int]) -> Data:
    """The samples of some classes, with the labels that they have."""
    wanted = torch.tensor(classes, device=data.train.labels.device)

    def part(split: Split) -> Split:
        return split.subset(torch.isin(split.labels, wanted).nonzero()[:, 0])

    return replace(data, train=part(data.train), check=part(data.check), test=part(data.test))


@torch.no_grad()
def accuracy_given(learner: Learner, position: int, task: Subtask) -> float:
    """The share of the task's test data, 0 to 1, that is named rightly among its classes."""
    with learner.inference(position) as model:
        right = sum(
            int((task.classes[0] + scores(model, x, task.classes).argmax(1) == y).sum())
            for x, y in task.data.test.batches(500)
        )
    return right / len(task.data.test)


@torch.no_grad()
def accuracy_unknown(learner: Learner, tasks: Sequence[Subtask]) -> float:
    """The same for samples of all tasks, which are not told apart; the mean over tasks."""
    shares = []
    for task in tasks:
        found = [answers(learner, x, tasks) == y for x, y in task.data.test.batches(500)]
        shares.append(torch.cat(found).double().mean().item())
    return statistics.fmean(shares)


def answers(learner: Learner, inputs: Tensor, tasks: Sequence[Subtask]) -> Tensor:
    """Classes `[samples]`, whatever the task: of all outputs, or of the least uncertain mask."""
    if not learner.apart:
        return scores(learner.model, inputs, range(CLASSES)).argmax(1)
    by_task = []
    for position, task in enumerate(tasks):
        with learner.inference(position) as model:
            by_task.append(scores(model, inputs, task.classes))
    found = torch.stack(by_task)  # [tasks, samples, classes of one]
    likely: Tensor = torch.special.entr(found.double().softmax(2)).sum(2).argmin(0)
    return likely * found.shape[2] + found.argmax(2).gather(0, likely[None])[0]


def scores(model: nn.Module, inputs: Tensor, classes: Sequence[int]) -> Tensor:
    """The outputs of some classes, `[samples, classes]`."""
    with fast(model):
        outputs: Tensor = model(inputs)
    return outputs[:, list(classes)].float()


def run_method(
    method: str, model: nn.Module, tasks: Sequence[Subtask], course: Course
) -> Outcome | None:
    """What a method makes of a copy of `model`; None, and a line, where it has nothing to train."""
    model = copy.deepcopy(model)
    learned = [accuracy_given(Learner(model, tasks[0], course), 0, tasks[0])]
    _, make = METHODS[method]
    seconds = 0.0
    with suitable_threads(model):
        try:
            start = time.perf_counter()
            learner = make(model, tasks[0], course, len(tasks))
            seconds += time.perf_counter() - start
            for position, task in enumerate(tasks[1:], 1):
                start = time.perf_counter()
                learner.learn(task)
                seconds += time.perf_counter() - start
                learned.append(accuracy_given(learner, position, task))
        except NothingToPruneError as error:
            print(f"{method}: {error}", flush=True)
            return None
        final = tuple(accuracy_given(learner, i, task) for i, task in enumerate(tasks))
        unknown = accuracy_unknown(learner, tasks)
    return Outcome(method, course.seed, tuple(learned), final, unknown, learner.storage(), seconds)


def run_setting(
    setting: Setting,
    data: Data,
    count: int,
    seeds: Sequence[int],
    methods: Sequence[str],
    loss: Competition,
    *,
    cache: Path,
    known: Collection[tuple[int, str]] = (),
) -> Iterator[list[Outcome]]:
    """What is not known of a setting, seed by seed; prints a line on each seed.

    known: (seed, method) of the outcomes that there are.
    """
    tasks = split_tasks(data, count)
    for seed in seeds:
        missing = [method for method in methods if (seed, method) not in known]
        if not missing:
            continue
        first = tasks[0].data
        device = first.train.labels.device
        name = f"{setting.name}-1of{count}"
        found = trained(name, setting.build, first, setting.recipe, seed, cache, device)
        course = Course(setting.recipe, seed, loss, max(setting.profiled, PROFILED))
        made = [run_method(method, found.model, tasks, course) for method in missing]
        origin = "from the cache" if found.cached else f"in {found.seconds:.1f} s"
        print(f"{setting.name}, seed {seed}: task A trained {origin}", flush=True)
        yield [outcome for outcome in made if outcome is not None]


def record_of(
    setting: Setting, data: Data, asked: argparse.Namespace, device: str
) -> Record[Outcome]:
    """The record of a setting, with what its file has where that is asked for."""
    options = {
        "tasks": asked.tasks, "loss": asked.loss, "recipe": asdict(setting.recipe),
        "profiled": max(setting.profiled, PROFILED), "evaluated": asked.evaluated,
        "data": data.origin,
    }  # fmt: skip
    tasks = "" if asked.tasks == 2 else f"-{asked.tasks}-tasks"
    title = f"RQ4, {setting.name}, {asked.tasks} tasks of {CLASSES // asked.tasks} classes"
    record = Record(
        asked.output / f"rq4-{setting.name}{tasks}.json", title, Outcome, identity,
        partial(tables, setting.name, asked.tasks), options, device,
    )  # fmt: skip
    if asked.resume:
        record.resume()
    return record


def save(record: Record[Outcome]) -> None:
    """Write the file and its plot."""
    record.save()
    plot(record.title, record.entries, record.path.with_suffix(".png"))


def report(record: Record[Outcome], data: Data) -> None:
    """Print the tables."""
    shown = record.tables(record.entries)
    seeds = {outcome.seed for outcome in record.entries}
    print(f"\n{record.title}; data: {data.origin}; mean ± deviation of {len(seeds)} seed(s)\n")
    print(text_table(shown.columns, shown.rows))
    if claims := shown.more["summary"]:
        print(f"\n{text_table(SUMMARY_COLUMNS, claims)}")
    print(f"\n{record.path} and {record.path.with_suffix('.png').name} written\n")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
    add_batch(parser)
    add = parser.add_argument
    add("--methods", default="all",
        help=f"comma list of {', '.join(METHODS)}, or all (default)")  # fmt: skip
    add("--tasks", type=int, choices=(2, 5), default=2, help="tasks (default: %(default)s)")
    add("--loss", choices=get_args(Competition), default="method",
        help="outputs that compete in training, see above (default: %(default)s)")  # fmt: skip
    add_resume(parser)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    seeds, methods = checked_seeds(asked.seeds), named(asked.methods, METHODS, "method")
    device = usable_device(asked.device)
    for setting in chosen(asked.settings):
        setting = setting.with_epochs(asked.epochs).with_batch(asked.batch)
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        record = record_of(setting, data, asked, device)
        known = [identity(outcome) for outcome in record.entries]
        for outcomes in run_setting(
            setting, data, asked.tasks, seeds, methods, asked.loss, cache=asked.cache, known=known
        ):
            record.add(outcomes)
            if record.entries:
                save(record)
        if not record.entries:
            raise NothingToPruneError(f"no method of {asked.methods} has anything to train here")
        save(record)
        report(record, data)


if __name__ == "__main__":
    run(main)
