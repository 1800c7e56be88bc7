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
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.common import results, tables
from benchmarks.common.data import Data, Split, load
from benchmarks.common.figures import pyplot, save_figure
from benchmarks.common.options import add_resume, checked_seeds, common, named, run, usable_device
from benchmarks.common.settings import SIMILAR, Setting, chosen
from benchmarks.common.tables import Cell, Column, spread
from benchmarks.common.training import (
    Recipe,
    fast,
    make_optimiser,
    suitable_layout,
    suitable_threads,
    take,
    trained,
)
from benchmarks.paper import adaptation as targets
from benchmarks.rivals.hat import HardAttention
from benchmarks.rivals.packnet import PackNet
from nss_prune import Slice, profile
from nss_prune.adaptation import Freezing
from nss_prune.adaptation.datasets import mixed
from nss_prune.adaptation.incremental import IncrementalTrainer
from nss_prune.adaptation.tasks import Task
from nss_prune.adaptation.training import Objective, TaskLoss
from nss_prune.deeparc import DeepArc
from nss_prune.errors import ArgumentError, NothingToPruneError

CLASSES = 10
TRACED = 20  # samples of each class, where only the neurons of a model are asked for
THIN = 0.5  # of an equal share of the weights, for a task of neusemslice-lamp
PROFILED = 1000  # samples of each class, where a setting's slices are computed from fewer

Competition = Literal["method", "task", "all"]

SUMMARY_COLUMNS = (
    Column("claim", "what was wanted"),
    Column("found", "found"),
    Column("wanted", "wanted"),
    Column("ahead", "ahead by"),
    Column("held", "held"),
)


@dataclass(frozen=True)
class Subtask:
    """Some of the classes, and the data of these alone."""

    classes: tuple[int, ...]
    data: Data


@dataclass(frozen=True)
class Course:
    """How a task is learned, the same for all methods.

    loss: whether the outputs of a sample's task compete in the loss, or those of all tasks, or
        what suits the method.
    profiled: samples of each class that slices are computed from.
    """

    recipe: Recipe
    seed: int
    loss: Competition = "method"
    profiled: int = PROFILED

    def again(self, share: float) -> Recipe:
        """The recipe for a share of its epochs."""
        return replace(self.recipe, epochs=int(share * self.recipe.epochs))


@dataclass(frozen=True)
class Outcome:
    """What a method made of a model. Accuracies are shares, 0 to 1.

    learned: accuracy on each task when it had just been learned.   final: in the end.
    unknown: the mean in the end where the task of a sample is not given.
    storage: bytes for task A.   seconds: of learning all tasks after A.
    """

    method: str
    seed: int
    learned: tuple[float, ...]
    final: tuple[float, ...]
    unknown: float
    storage: int
    seconds: float

    @property
    def average(self) -> float:
        return statistics.fmean(self.final)

    @property
    def forgetting(self) -> float:
        pairs = zip(self.learned[:-1], self.final[:-1], strict=True)
        return statistics.fmean(before - after for before, after in pairs)


class Batches:
    """Batches of a split in random order, another one in each pass, augmented if asked to."""

    def __init__(self, split: Split, size: int, augment: bool, random: torch.Generator) -> None:
        self.split = split
        self.size = size
        self.augment = augment
        self.random = random

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.split), generator=self.random)
        for indices in order.split(self.size):
            yield take(self.split, indices, self.augment, self.random)


class InOrder:
    """Batches of a split in order, as often as asked."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.split.batches(250)


def study(
    freezing: Freezing,
    own: Split,
    replayed: Split | None,
    objective: Objective,
    recipe: Recipe,
    seed: int,
    attention: HardAttention | None = None,
) -> None:
    """Train what a freezing lets train; each epoch passes over all of `own` and `replayed`.

    attention: whose gates train as well, and are asked for their penalty.
    """
    model, steps = freezing.model, recipe.epochs * -(-len(own) // recipe.batch)
    if steps == 0:
        return
    random = torch.Generator().manual_seed(seed)
    data = Batches(own, recipe.batch, recipe.augment, random)
    again = None
    if replayed is not None:
        size = max(1, round(recipe.batch * len(replayed) / len(own)))
        again = Batches(replayed, size, recipe.augment, random)
    optimiser = make_optimiser(model.parameters(), recipe)
    if attention is not None:
        gates = list(attention.embeddings.values())
        optimiser.add_param_group({"params": gates, "weight_decay": 0.0})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, steps)
    model.train()
    with (
        torch.random.fork_rng(),
        suitable_threads(model),
        suitable_layout(model),
        freezing.attach(optimiser),
        tqdm(total=steps, desc="next task", leave=False, disable=None) as bar,
    ):
        torch.manual_seed(seed)  # for dropout
        for _ in range(recipe.epochs):
            for inputs, labels, count in mixed(data, again):
                with fast(model):
                    outputs = model(inputs)
                loss = objective(outputs.float(), labels, count)
                if attention is not None:
                    loss = loss + attention.penalty()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                if attention is not None:
                    attention.advance()
                bar.update()
    model.eval()


class Learner:
    """Learns task after task; by itself it trains the whole network, and replays.

    Args:
        model: Trained on the first task; it is changed.
        first: That task.
        course: How the others are learned.
        replay: Share of the earlier tasks' data that is kept and replayed.
    """

    def __init__(
        self, model: nn.Module, first: Subtask, course: Course, replay: float = 0.0
    ) -> None:
        self.model = model
        self.course = course
        self.replay = replay
        self.tasks = [first]

    @property
    def apart(self) -> bool:
        """Whether tasks do not compete: which one a sample belongs to is always asked first."""
        return False

    def learn(self, task: Subtask) -> None:
        study(
            self.freezing(task), task.data.train, self.replayed(), self.objective(task),
            self.course.recipe, self.course.seed,
        )  # fmt: skip
        self.tasks.append(task)

    def freezing(self, task: Subtask) -> Freezing:
        """What trains for the next task."""
        every = {
            name: torch.ones_like(parameter, dtype=torch.bool)
            for name, parameter in self.model.named_parameters()
        }
        return Freezing(self.model, every)

    def objective(self, task: Subtask) -> Objective:
        earlier = tuple(c for known in self.tasks for c in known.classes)
        if self.course.loss == "all" or (self.course.loss == "method" and not self.apart):
            return Objective(*[TaskLoss(tuple(sorted({*earlier, *task.classes})))] * 2)
        return Objective(TaskLoss(task.classes), TaskLoss(earlier))

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        """The model as it answers for a task."""
        return nullcontext(self.model)

    def replayed(self) -> Split | None:
        """What is kept of the tasks so far."""
        if self.replay == 0:
            return None
        parts = [drawn(task.data.train, self.replay, self.course.seed) for task in self.tasks]
        pixels, labels = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "labels")
        )
        return replace(parts[0], pixels=pixels, labels=labels)

    def storage(self) -> int:
        """Bytes for the first task, beside the model: its samples, a byte for each label."""
        if self.replay == 0:
            return 0
        kept = drawn(self.tasks[0].data.train, self.replay, self.course.seed)
        return kept.pixels.nbytes + len(kept)


class Original(Learner):
    """Learns nothing more."""

    def learn(self, task: Subtask) -> None:
        self.tasks.append(task)


class RedundantLayers(Learner):
    """Trains the layers that DeepArc finds redundant for the first task, and nothing else."""

    def freezing(self, task: Subtask) -> Freezing:
        first = self.tasks[0].data.train.per_category(self.course.profiled)
        found = DeepArc(self.model, InOrder(first), SIMILAR, progress=False)
        if not found.redundant:
            similar = max(found.similarity.values())
            raise NothingToPruneError(
                f"no layer is redundant: similarities reach {similar:.3f}, not {SIMILAR}"
            )
        redundant = {name: ~others for name, others in found.trainable().items()}
        norms = found.freezing().frozen_statistics  # these belong to redundant layers
        others = {
            name: torch.ones_like(module.running_mean, dtype=torch.bool)
            for name, module in self.model.named_modules()
            if isinstance(getattr(module, "running_mean", None), Tensor) and name not in norms
        }
        return Freezing(self.model, redundant, others)


class NonCriticalNeurons(Learner):
    """NeuSemSlice: trains what is not critical to earlier tasks."""

    def __init__(
        self,
        model: nn.Module,
        first: Subtask,
        course: Course,
        replay: float = 0.0,
        share: float | None = None,
        weights: float | None = None,
    ) -> None:
        super().__init__(model, first, course, replay)
        self.trainer = IncrementalTrainer(
            model, data=self._profiled(first), classes=first.classes, share=share,
            weights=weights, progress=False,
        )  # fmt: skip

    @property
    def apart(self) -> bool:
        return self.replay == 0

    def learn(self, task: Subtask) -> None:
        super().learn(task)
        self.trainer.add(self._profiled(task))

    def freezing(self, task: Subtask) -> Freezing:
        inputs, _ = next(task.data.train.batches(8))
        return self.trainer.freezing(inputs)

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        return self.trainer.task(position)

    def storage(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task"
            self.trainer.tasks[0].save(path)
            return super().storage() + path.stat().st_size

    def _profiled(self, task: Subtask) -> InOrder:
        return InOrder(task.data.train.per_category(self.course.profiled))


class SettledNeurons(NonCriticalNeurons):
    """NeuSemSlice whose slices are small, and trained until they do alone.

    Args:
        tasks: How many there will be.
        again: Epochs of that training, as a share of those of a task.
        thin: Whether a task keeps more neurons, and of their weights a part.
    """

    def __init__(
        self,
        model: nn.Module,
        first: Subtask,
        course: Course,
        tasks: int,
        again: float = 0.5,
        *,
        thin: bool = False,
    ) -> None:
        self.count = tasks
        # A share of neurons makes its square of the parameters.
        self.power = 0.25 if thin else 0.5
        weights = THIN / tasks if thin else None
        super().__init__(model, first, course, share=self._share(1), weights=weights)
        self.again = course.again(again)
        self._settle(first)

    def learn(self, task: Subtask) -> None:
        self.trainer.share = self._share(len(self.tasks) + 1)
        super().learn(task)
        if len(self.tasks) < self.count:
            self._settle(task)

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        settled = position < self.count - 1
        return self.trainer.task(position, masked=True if settled else None)

    def _share(self, number: int) -> float:
        """Of each layer's neurons for a task; it reads those of the tasks before it."""
        return float((number / self.count) ** self.power)

    def _settle(self, task: Subtask) -> None:
        inputs, _ = next(task.data.train.batches(8))
        freezing = self.trainer.settling(inputs)
        objective = self.objective(task)
        with self.trainer.tasks[-1].masked(self.model):
            study(freezing, task.data.train, None, objective, self.again, self.course.seed)


class PackedWeights(Learner):
    """PackNet: every task keeps its largest weights, an equal share of them all.

    Args:
        tasks: How many there will be.
        again: Epochs that the kept weights train for, as a share of those of a task.
    """

    def __init__(
        self, model: nn.Module, first: Subtask, course: Course, tasks: int, again: float = 0.5
    ) -> None:
        super().__init__(model, first, course)
        self.packed = PackNet(model)
        self.left = tasks
        self.again = course.again(again)
        self._pack(first)

    @property
    def apart(self) -> bool:
        return True

    def learn(self, task: Subtask) -> None:
        super().learn(task)
        self._pack(task)

    def freezing(self, task: Subtask) -> Freezing:
        return self.packed.free(task.classes)

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        return self.packed.masked(position + 1)

    def storage(self) -> int:
        return self.packed.mask_bytes

    def _pack(self, task: Subtask) -> None:
        """Keep weights for the task just learned, and train them again."""
        kept = self.packed.keep(1 / self.left, task.classes)
        self.left -= 1
        if self.left:
            objective = self.objective(task)
            study(kept, task.data.train, None, objective, self.again, self.course.seed)


class AttendedNeurons(NonCriticalNeurons):
    """HAT: every task trains gates of the neurons, and takes those that are open in the end."""

    def __init__(self, model: nn.Module, first: Subtask, course: Course) -> None:
        Learner.__init__(self, model, first, course)
        batches = first.data.train.per_category(TRACED)
        self.groups = profile(model, InOrder(batches), progress=False).slice(1.0).groups
        critical = self._attend(first, Learner.freezing(self, first), {})
        self.trainer = IncrementalTrainer(model, critical, classes=first.classes, progress=False)

    def learn(self, task: Subtask) -> None:
        critical = self._attend(task, self.freezing(task), self._taken())
        learned = Task(f"task {len(self.tasks) + 1}", critical, task.classes, CLASSES)
        self.trainer.tasks = (*self.trainer.tasks, learned)
        self.tasks.append(task)

    def inference(self, position: int) -> AbstractContextManager[nn.Module]:
        return self.trainer.task(position, masked=True)

    def _attend(self, task: Subtask, freezing: Freezing, taken: dict[str, Tensor]) -> Slice:
        """The neurons that are open once the task is learned."""
        steps = -(-len(task.data.train) // self.course.recipe.batch)
        attention = HardAttention(self.groups, taken, steps, self.course.seed)
        with attention.attached(self.model):
            study(
                freezing, task.data.train, None, self.objective(task), self.course.recipe,
                self.course.seed, attention,
            )  # fmt: skip
        return attention.slice()

    def _taken(self) -> dict[str, Tensor]:
        """Layer -> True for neurons of the tasks so far."""
        slices = [task.slice.kept for task in self.trainer.tasks]
        return {name: torch.stack([kept[name] for kept in slices]).any(0) for name in slices[0]}


METHODS: dict[str, tuple[str, Callable[[nn.Module, Subtask, Course, int], Learner]]] = {
    "original": ("Original", lambda m, a, c, n: Original(m, a, c)),
    "retrain": ("Retrain", lambda m, a, c, n: Learner(m, a, c)),
    "replay-5": ("Replay 5 %", lambda m, a, c, n: Learner(m, a, c, 0.05)),
    "replay-10": ("Replay 10 %", lambda m, a, c, n: Learner(m, a, c, 0.1)),
    "replay-100": ("Replay 100 %", lambda m, a, c, n: Learner(m, a, c, 1.0)),
    "deeparc": ("DeepArc", lambda m, a, c, n: RedundantLayers(m, a, c)),
    "packnet": ("PackNet", lambda m, a, c, n: PackedWeights(m, a, c, n)),
    "packnet-long": ("PackNet, long", lambda m, a, c, n: PackedWeights(m, a, c, n, again=1.0)),
    "hat": ("HAT", lambda m, a, c, n: AttendedNeurons(m, a, c)),
    "neusemslice": ("NeuSemSlice", lambda m, a, c, n: NonCriticalNeurons(m, a, c)),
    "neusemslice-replay-10": (
        "NeuSemSlice + Replay 10 %",
        lambda m, a, c, n: NonCriticalNeurons(m, a, c, 0.1),
    ),
    "neusemslice-settled": (
        "NeuSemSlice, settled",
        lambda m, a, c, n: SettledNeurons(m, a, c, n),
    ),
    "neusemslice-settled-long": (
        "NeuSemSlice, settled long",
        lambda m, a, c, n: SettledNeurons(m, a, c, n, again=1.0),
    ),
    "neusemslice-lamp": (
        "NeuSemSlice + LAMP",
        lambda m, a, c, n: SettledNeurons(m, a, c, n, thin=True),
    ),
    "neusemslice-lamp-long": (
        "NeuSemSlice + LAMP, long",
        lambda m, a, c, n: SettledNeurons(m, a, c, n, again=1.0, thin=True),
    ),
}


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


def drawn(split: Split, share: float, seed: int) -> Split:
    """A random share of a split, at least one sample."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    chosen = order[: max(1, round(share * len(split)))]
    return split.subset(chosen.to(split.labels.device))


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
    known: Sequence[Outcome] = (),
) -> Iterator[list[Outcome]]:
    """What is known of a setting, and what is not, seed by seed; prints a line on each seed.

    Yields all outcomes so far, those that are known first.
    """
    outcomes = list(known)
    if known:
        yield outcomes
    tasks = split_tasks(data, count)
    for seed in seeds:
        measured = {outcome.method for outcome in outcomes if outcome.seed == seed}
        missing = [method for method in methods if method not in measured]
        if not missing:
            continue
        first = tasks[0].data
        device = first.train.labels.device
        name = f"{setting.name}-1of{count}"
        found = trained(name, setting.build, first, setting.recipe, seed, cache, device)
        course = Course(setting.recipe, seed, loss, max(setting.profiled, PROFILED))
        made = [run_method(method, found.model, tasks, course) for method in missing]
        outcomes += [outcome for outcome in made if outcome is not None]
        origin = "from the cache" if found.cached else f"in {found.seconds:.1f} s"
        print(f"{setting.name}, seed {seed}: task A trained {origin}", flush=True)
        yield outcomes


def columns(count: int) -> list[Column]:
    letters = [chr(ord("A") + i) for i in range(count)]
    return [
        Column("method", "Method"),
        *[Column(f"task_{letter}", f"task {letter} %") for letter in letters],
        Column("average", "average %"),
        Column("forgetting", "forgetting, points"),
        Column("unknown", "task not given %"),
        Column("storage", "bytes for A", 0),
        Column("seconds", "s", 1),
        Column("paper_A", "paper A %"),
        Column("paper_B", "paper B %"),
        Column("paper_average", "paper average %"),
    ]


def table_rows(setting: str, outcomes: Sequence[Outcome]) -> list[dict[str, Cell]]:
    """A row for each method, over seeds."""
    rows = []
    for method, (title, _) in METHODS.items():
        same = [outcome for outcome in outcomes if outcome.method == method]
        if not same:
            continue
        count = len(same[0].final)
        row: dict[str, Cell] = {"method": title}
        for position in range(count):
            values = [100 * outcome.final[position] for outcome in same]
            row[f"task_{chr(ord('A') + position)}"] = spread(values)
        row |= {
            "average": spread([100 * outcome.average for outcome in same]),
            "forgetting": spread([100 * outcome.forgetting for outcome in same]),
            "unknown": spread([100 * outcome.unknown for outcome in same]),
            "storage": spread([outcome.storage for outcome in same]),
            "seconds": spread([outcome.seconds for outcome in same]),
        }
        paper = targets.TABLE_6.get((setting, method)) if count == 2 else None
        if paper is not None:
            row |= {
                "paper_A": paper.task_a,
                "paper_B": paper.task_b,
                "paper_average": paper.average,
            }
        rows.append(row)
    return rows


# Points that task A may lose.
FORGETTING = {"neusemslice": 0.5, "neusemslice-replay-10": 0.1, "neusemslice-lamp": 0.5}
# Of which rivals a method is to be ahead, and in what of theirs: see ahead().
RIVALS = (
    ("neusemslice-lamp", "packnet", "average"),
    ("neusemslice-lamp-long", "packnet-long", "average"),
    ("neusemslice-lamp-long", "replay-100", "average"),
    ("neusemslice-lamp", "replay-100", "unknown"),
)


def summary(setting: str, outcomes: Sequence[Outcome]) -> list[dict[str, Cell]]:
    """What is to be shown of NeuSemSlice with two tasks, as far as its methods were run."""
    claims = [at_most(outcomes, method, points) for method, points in FORGETTING.items()]
    if paper := targets.TABLE_6.get((setting, "neusemslice")):
        claims.append(at_least(outcomes, "neusemslice", paper.average))
    claims += [ahead(outcomes, method, rival, of) for method, rival, of in RIVALS]
    return [found for found in claims if found]


def at_most(outcomes: Sequence[Outcome], method: str, points: float) -> dict[str, Cell]:
    """Whether task A loses at most so many points; empty where the method was not run."""
    found = [*by_seed(outcomes, method, "forgetting").values()]
    return claim(f"{METHODS[method][0]}: points that task A loses, at most", found, points, -1)


def at_least(outcomes: Sequence[Outcome], method: str, average: float) -> dict[str, Cell]:
    """Whether the average reaches the paper's; empty where the method was not run."""
    found = [*by_seed(outcomes, method, "average").values()]
    return claim(f"{METHODS[method][0]}: average %, at least the paper's", found, average)


def ahead(outcomes: Sequence[Outcome], method: str, rival: str, of: str) -> dict[str, Cell]:
    """Whether the average is at least a rival's, on the models that both have.

    of: "average", or "unknown" where the rival is not given the task, as in the paper.
    """
    title, other = METHODS[method][0], METHODS[rival][0]
    mine, theirs = by_seed(outcomes, method, "average"), by_seed(outcomes, rival, of)
    seeds = sorted(mine.keys() & theirs.keys())
    note = ", which is not given the task" if of == "unknown" else ""
    text = f"{title}: average %, at least that of {other}{note}"
    return claim(text, [mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def by_seed(outcomes: Sequence[Outcome], method: str, field: str) -> dict[int, float]:
    """Seed -> what a method's outcome has for a field, in percent."""
    return {o.seed: 100 * getattr(o, field) for o in outcomes if o.method == method}


def claim(
    text: str, found: Sequence[float], wanted: float | Sequence[float], sign: int = 1
) -> dict[str, Cell]:
    """A row of the summary; empty without anything found.

    sign: -1 where less is better.
    """
    if not found:
        return {}
    limits = [wanted] * len(found) if isinstance(wanted, float) else list(wanted)
    lead = spread([sign * (mine - limit) for mine, limit in zip(found, limits, strict=True)])
    shown = wanted if isinstance(wanted, float) else spread(limits)
    held = "yes" if lead["mean"] >= 0 else "no"
    return {"claim": text, "found": spread(found), "wanted": shown, "ahead": lead, "held": held}


def plot(title: str, outcomes: Sequence[Outcome], path: Path) -> None:
    """A group of bars for each method: the accuracy on each task, with the deviation of seeds."""
    methods = [method for method in METHODS if any(o.method == method for o in outcomes)]
    count = len(outcomes[0].final)
    figure, axes = pyplot.subplots(figsize=(1 + 1.1 * len(methods), 4), layout="constrained")
    width = 0.8 / count
    for position in range(count):
        cells = [
            spread([100 * o.final[position] for o in outcomes if o.method == method])
            for method in methods
        ]
        axes.bar(
            [i + (position - (count - 1) / 2) * width for i in range(len(methods))],
            [cell["mean"] for cell in cells], width, yerr=[cell["std"] for cell in cells],
            label=f"task {chr(ord('A') + position)}",
        )  # fmt: skip
    names = [METHODS[method][0].replace(" + ", " +\n") for method in methods]
    axes.set_xticks(range(len(methods)), names, rotation=30, ha="right")
    axes.set(ylabel="test accuracy, %", title=title)
    axes.grid(alpha=0.3, axis="y")
    figure.legend(loc="outside right upper")
    save_figure(figure, path)


@dataclass(frozen=True)
class Record:
    """The result file of a setting.

    Attributes:
        options: How it is measured.
    """

    setting: Setting
    data: Data
    count: int
    output: Path
    options: dict[str, Any]

    @property
    def path(self) -> Path:
        tasks = "" if self.count == 2 else f"-{self.count}-tasks"
        return self.output / f"rq4-{self.setting.name}{tasks}.json"

    @property
    def title(self) -> str:
        return f"RQ4, {self.setting.name}, {self.count} tasks of {CLASSES // self.count} classes"

    def save(self, outcomes: Sequence[Outcome]) -> None:
        """Write the file and its plot."""
        results.write(
            self.path, self.title, columns(self.count), table_rows(self.setting.name, outcomes),
            seeds=sorted({outcome.seed for outcome in outcomes}),
            device=self.data.train.labels.device, options=self.options,
            summary=summary(self.setting.name, outcomes) if self.count == 2 else [],
            outcomes=[asdict(outcome) for outcome in outcomes],
        )  # fmt: skip
        plot(self.title, outcomes, self.path.with_suffix(".png"))

    def show(self, outcomes: Sequence[Outcome]) -> None:
        seeds = {outcome.seed for outcome in outcomes}
        rows = table_rows(self.setting.name, outcomes)
        print(
            f"\n{self.title}; data: {self.data.origin}; mean ± deviation of {len(seeds)} seed(s)\n"
        )
        print(tables.text_table(columns(self.count), rows))
        if self.count == 2 and (claims := summary(self.setting.name, outcomes)):
            print(f"\n{tables.text_table(SUMMARY_COLUMNS, claims)}")
        print(f"\n{self.path} and {self.path.with_suffix('.png').name} written\n")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
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
        setting = setting.with_epochs(asked.epochs)
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        options = {
            "tasks": asked.tasks, "loss": asked.loss, "recipe": asdict(setting.recipe),
            "profiled": max(setting.profiled, PROFILED), "evaluated": asked.evaluated,
            "data": data.origin,
        }  # fmt: skip
        record = Record(setting, data, asked.tasks, asked.output, options)
        known = results.earlier(record.path, options, "outcomes", Outcome) if asked.resume else []
        outcomes = known
        for so_far in run_setting(
            setting, data, asked.tasks, seeds, methods, asked.loss, cache=asked.cache,
            known=known,
        ):  # fmt: skip
            if so_far:
                record.save(so_far)
            outcomes = so_far
        if not outcomes:
            raise NothingToPruneError(f"no method of {asked.methods} has anything to train here")
        record.show(outcomes)


if __name__ == "__main__":
    run(main)
