"""The accuracy board: what every criterion leaves of a model's accuracy, without any training.

    python benchmarks/accuracy.py                                      a minute, no download
    python benchmarks/accuracy.py --settings mlp-mnist,alexnet-cifar10 --data DIR

Every criterion prunes the same trained model, on the same groups of neurons, to the same share of
its multiply-accumulates (or of its parameters), and its choice is removed in the same way. What is
left is measured on pictures that calibrated nothing. A seed draws the pictures that calibrate;
model and test pictures stay the same. With `--redraw` a pretrained model's test pictures are drawn
anew as well, which there is more to learn from where pictures are few. With `--models` each seed
has a model of its own, trained with that seed: pictures that one model happens to get right after
a light cut say little of the next. The criteria:

    magnitude-l1, magnitude-l2, bn-scale, lamp, fpgm, taylor, hessian, random
                torch-pruning's, with its defaults; gradients from the calibration data with labels
    semantic    the paper's: 1 - the entry threshold of each neuron
    divergence  ours: nss_prune.allocation.divergence, the order and how many go of each layer

All but the last rank neurons, and how many go of each layer is a question of its own:

    local       the same share of each layer
    global      one threshold for all layers; with `semantic` this is one theta, the paper's rule
    cost        one threshold for scores that are divided by what a neuron costs
    ours        as many of each layer as `divergence` takes, in the criterion's order

And every slice is measured in several kinds:

    plain                the neurons are removed
    recalibrated         and the BatchNorms' statistics moved by as much as those of the calibration
                         data moved, by nss_prune.compensation.recalibration
    folded               removed after nss_prune.compensation.folding.fold, which `divergence`
    counts on folded-recalibrated  both refit                removed after
    nss_prune.compensation.refit.refit, which takes a pass for each layer folded-balanced,
    folded-recalibrated-balanced, refit-balanced
                         and the class scores shifted by nss_prune.compensation.balance
    plain-tuned          `plain`, then trained on all training data for `--tuned-epochs`, at a
                         tenth of the learning rate that the model was trained with
    folded-tuned         `folded`, then trained in the same way

What is left is measured by its accuracy, by the largest share of its samples that a class loses,
and by its agreement with the whole model: the share of test pictures that get the same class. If
a cut costs hardly any accuracy, the best of many criteria is one that happens to be right more
often than the whole model; agreement tells what a cut changed from what it happened to gain.

`efficientnet-imagenet` prunes the hidden channels of the inverted bottlenecks alone, to a share of
their own multiply-accumulates; `efficientnet-imagenet-whole` all that can be pruned. Where a
criterion cannot reach a budget (bn-scale leaves layers without BatchNorm alone), the cell is empty.
The result file is saved after every slice, and a run that was stopped goes on from it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import hflip

from benchmarks.common import results
from benchmarks.common.data import Data, Split, load
from benchmarks.common.figures import pyplot, save_figure
from benchmarks.common.options import checked_seeds, common, usable_device
from benchmarks.common.results import Cell, Column, spread
from benchmarks.common.settings import BEYOND, SETTINGS, Setting
from benchmarks.common.training import (
    Recipe,
    predictions,
    share_equal,
    suitable_threads,
    train,
    trained,
)
from nss_prune import NSSImportance, Slice, remove
from nss_prune.allocation.budget import (
    TOLERANCE,
    Limits,
    ShareOf,
    limited,
    mac_share,
    parameter_share,
    solve,
)
from nss_prune.allocation.divergence import allocate
from nss_prune.allocation.effects import measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.compensation.balance import ClassShares, balance, class_shares
from nss_prune.compensation.folding import fold
from nss_prune.compensation.recalibration import (
    NormStatistics,
    kept_statistics,
    norm_statistics,
    recalibrate,
    running_norms,
)
from nss_prune.compensation.refit import refit
from nss_prune.core.views import Views, views_of
from nss_prune.discovery.samples import readable
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError
from nss_prune.graph.costs import macs_by_module
from nss_prune.graph.neurons import Member, NeuronGroup, NeuronMap
from nss_prune.graph.tracing import trace
from nss_prune.profiling.run import profile_neurons
from nss_prune.statistics.consumers import ConsumerSums
from nss_prune.statistics.moments import ConsumerStatistics
from nss_prune.surgery.trial import verified

Batches = Iterable[tuple[Tensor, Tensor]]
Scores = dict[str, Tensor]
Field = Literal["accuracy", "agreement"]

RIVALS: dict[str, Callable[[], Any]] = {
    "magnitude-l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "magnitude-l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "bn-scale": tp.importance.BNScaleImportance,
    "lamp": tp.importance.LAMPImportance,
    "fpgm": tp.importance.FPGMImportance,
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
    "random": tp.importance.RandomImportance,
}
SEMANTIC, DIVERGENCE = "semantic", "divergence"
CRITERIA = (*RIVALS, SEMANTIC, DIVERGENCE)
ALLOCATIONS = ("local", "global", "cost", "ours")
UNTUNED = (
    "plain", "recalibrated", "folded", "folded-recalibrated", "refit",
    "folded-balanced", "folded-recalibrated-balanced", "refit-balanced",
)  # fmt: skip
TUNED = ("plain-tuned", "folded-tuned")
KINDS = (*UNTUNED, *TUNED)
BEST = {"untuned": UNTUNED, "tuned": TUNED}
WHOLE = "whole model"
HIDDEN_READERS = "conv_pwl"  # timm's name for what reads an inverted bottleneck's hidden channels

SUMMARY_COLUMNS = (
    Column("level", "kept"),
    Column("kind", "kind"),
    Column("whole", "whole model, %"),
    Column("ours", "divergence, %"),
    Column("rival", "best other"),
    Column("theirs", "its accuracy, %"),
    Column("lead", "lead, points"),
)

AGREEMENT_COLUMNS = (
    Column("level", "kept"),
    Column("kind", "kind"),
    Column("ours", "divergence, %"),
    Column("rival", "best other"),
    Column("theirs", "its agreement, %"),
    Column("lead", "lead, points"),
)

CLASS_COLUMNS = (
    Column("level", "kept"),
    Column("kind", "kind"),
    Column("accuracy", "accuracy, %"),
    Column("balanced", "balanced, %"),
    Column("drop", "most that a class loses, points"),
    Column("balanced_drop", "balanced, points"),
)


@dataclass(frozen=True)
class Level:
    """A budget: the share ``kept`` of the "MACs" or the "parameters"."""

    of: str
    kept: float

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise ArgumentError(f"the share kept is {self.kept}; it is in (0, 1].")

    def __str__(self) -> str:
        return f"{self.of} {self.kept:g}"


def levels(of: str, *shares: float) -> tuple[Level, ...]:
    return tuple(Level(of, share) for share in shares)


@dataclass(frozen=True)
class Board:
    """One model on one data set, and how it is pruned.

    calibrated: pictures that a seed draws.   batch: pictures at a time.
    hidden: prune the hidden channels of inverted bottlenecks alone, to a share of their MACs.
    tuned_epochs: of training after pruning, where that is asked for and there is data for it.
    mirrored: calibrate with the mirror images of the pictures, too.
    models: every seed has a model of its own.
    """

    name: str
    setting: Setting
    calibrated: int
    levels: tuple[Level, ...] = levels("MACs", 0.9, 0.8, 0.7, 0.6, 0.5)
    batch: int = 500
    hidden: bool = False
    tuned_epochs: int = 1
    mirrored: bool = False
    models: bool = False

    @property
    def tuned(self) -> Recipe:
        """How the model is trained on after pruning; for 0 epochs where it is a pretrained one."""
        recipe = self.setting.recipe
        epochs = self.tuned_epochs if recipe.epochs else 0
        return replace(recipe, epochs=epochs, learning_rate=recipe.learning_rate / 10)


CIFAR_CALIBRATED = 2000
IMAGENET = SETTINGS["efficientnet-imagenet"]
REGISTERED = (
    Board("mlp-digits", SETTINGS["mlp-digits"], 500),
    Board(
        "mlp-mnist",
        SETTINGS["mlp-mnist"],
        10_000,
        Board.levels + levels("parameters", 0.3, 0.2, 0.1, 0.07, 0.05),
    ),
    *(
        Board(setting.name, setting, CIFAR_CALIBRATED)
        for setting in (
            SETTINGS["alexnet-cifar10"],
            SETTINGS["alexnet-quarter-cifar10"],
            SETTINGS["vgg16-cifar10"],
            *BEYOND,
        )
    ),
    Board(IMAGENET.name, IMAGENET, 500, levels("MACs", 0.9, 0.8, 0.7, 0.6), 50, hidden=True),
    Board(f"{IMAGENET.name}-whole", IMAGENET, 500, levels("MACs", 0.8, 0.6), 50),
)
BOARDS = {board.name: board for board in REGISTERED}


@dataclass(frozen=True)
class Variant:
    """Who ranks the neurons, and what says how many go of each layer."""

    criterion: str
    allocation: str

    def __str__(self) -> str:
        if self.criterion == DIVERGENCE:
            return self.criterion
        return f"{self.criterion}, {self.allocation}"


@dataclass(frozen=True)
class Measured:
    """What one slice leaves.

    reached: the share of the budget's cost that it keeps.
    accuracy, dense: shares, 0 to 1; None where the budget is not met; dense is the whole model's.
    class_drop: the largest share of its samples that a class has lost; None if it is not known.
    agreement: share of samples that get the class that the whole model gives; likewise.
    """

    seed: int
    criterion: str
    allocation: str
    level: str
    kind: str
    reached: float
    accuracy: float | None
    dense: float
    class_drop: float | None = None
    agreement: float | None = None


# What is pruned


@dataclass(frozen=True)
class Subject:
    """A model, the neurons that every criterion chooses from, and what a slice of them keeps."""

    model: nn.Module
    example: Tensor
    neurons: NeuronMap
    shares: Mapping[str, ShareOf]

    @property
    def groups(self) -> tuple[NeuronGroup, ...]:
        return self.neurons.groups


def subject_of(board: Board, model: nn.Module, example: Tensor) -> Subject:
    """Everything of the model that can be removed, or the hidden channels alone."""
    neurons = discover(model, example)
    if board.hidden:
        others = [group.name for group in neurons.groups if not is_hidden(group)]
        neurons = neurons.without(dict.fromkeys(others, "no hidden channels"))
    neurons = verified(model, readable(model, neurons, example), example)
    by_module = macs_by_module(model, example)
    whole = mac_share(neurons.groups, model, by_module[""], example)
    theirs = {member.name for group in neurons.groups for member in group.members}
    own = sum(by_module.get(name, 0) for name in theirs) / by_module[""] if board.hidden else 1.0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shares: dict[str, ShareOf] = {
        "MACs": lambda critical: 1 - (1 - whole(critical)) / own,
        "parameters": parameter_share(neurons.groups, model, parameters),
    }
    return Subject(model, example, neurons, shares)


def is_hidden(group: NeuronGroup) -> bool:
    return any(reader.name.endswith(HIDDEN_READERS) for reader in group.readers)


# Who chooses


class Ranker:
    """torch-pruning's criteria on our groups of neurons; the subject's model is left alone."""

    def __init__(self, subject: Subject) -> None:
        self._model = copy.deepcopy(subject.model)
        graph, _ = trace(self._model, subject.example)
        self._groups = [(group, *self._traced(graph, group)) for group in subject.groups]

    def _traced(self, graph: Any, group: NeuronGroup) -> tuple[Any, Member]:
        """torch-pruning's group, and the side on which its root has the neurons."""
        module = self._model.get_submodule(group.name)
        root = next(member for member in group.members if member.name == group.name)
        function = graph.get_pruner_of_module(module).prune_out_channels
        return graph.get_pruning_group(module, function, list(range(root.width))), root

    def scores(self, importance: Any, gradients: Mapping[str, Tensor] | None) -> Scores | None:
        """Layer -> scores, infinite where torch-pruning leaves it alone; None if that is all."""
        for name, parameter in self._model.named_parameters():
            parameter.grad = None if gradients is None else gradients[name].clone()
        found = {}
        for group, traced, root in self._groups:
            by_channel = importance(traced)
            if by_channel is None:
                continue
            values = by_channel.detach().double().cpu()[root.channels]
            total = torch.zeros(group.size).double().index_add(0, root.neurons, values)
            average = total / torch.bincount(root.neurons, minlength=group.size)
            found[group.name] = average.nan_to_num(nan=0.0)  # of a layer without gradients
        alone = {
            group.name: torch.full((group.size,), torch.inf).double() for group, *_ in self._groups
        }
        return {**alone, **found} if found else None


def mean_gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Parameter -> the gradient of the mean loss over the data."""
    found = zeros_like_parameters(model)
    for inputs, labels in batches:
        add_gradients(found, model, inputs, labels, 1)
    return scaled(found, batches)


def squared_gradients(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Parameter -> the mean over the samples of their squared gradients.

    GroupHessianImportance.accumulate_grad of torch-pruning 1.6 keeps the last sample's alone.
    """
    found = zeros_like_parameters(model)
    for inputs, labels in batches:
        for picture, label in zip(inputs.split(1), labels.split(1), strict=True):
            add_gradients(found, model, picture, label, 2)
    return scaled(found, batches)


def zeros_like_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in model.named_parameters()}


def add_gradients(
    total: dict[str, Tensor], model: nn.Module, inputs: Tensor, labels: Tensor, power: int
) -> None:
    parameters = dict(model.named_parameters())
    loss = cross_entropy(model(inputs), labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            total[name] += gradient**power


def scaled(total: dict[str, Tensor], batches: Batches) -> dict[str, Tensor]:
    samples = sum(len(labels) for _, labels in batches)
    return {name: value / samples for name, value in total.items()}


GRADIENTS = {"taylor": mean_gradients, "hessian": squared_gradients}


@dataclass(frozen=True)
class Tuning:
    """How models are trained on after they were pruned."""

    split: Split
    recipe: Recipe


class Calibration:
    """What one draw of pictures tells of a subject; each part is found once, when it is needed."""

    def __init__(
        self,
        subject: Subject,
        ranker: Ranker,
        batches: Batches,
        seed: int,
        tuning: Tuning | None = None,
    ) -> None:
        self.subject = subject
        self.batches = batches
        self.tuning = tuning
        self._ranker = ranker
        self._seed = seed
        self._scores: dict[str, Scores | None] = {}
        self._allocated: dict[Level, tuple[Slice, float]] = {}

    def slice(self, variant: Variant, level: Level) -> tuple[Slice, float] | None:
        """The slice and the share that it keeps; None where the criterion has no say."""
        if variant.criterion == DIVERGENCE:
            return self._divergence(level)
        scores = self._scores_of(variant.criterion)
        if scores is None:
            return None
        if variant.allocation == "ours":
            return self._in_our_numbers(scores, level)
        groups, share = self.subject.groups, self.subject.shares[level.of]
        alone = {name: len(values) for name, values in scores.items() if values.isinf().all()}
        if variant.allocation == "local":
            scores = {name: by_rank(values) for name, values in scores.items()}
        elif variant.allocation == "cost":
            costs = neuron_costs(groups, share)
            scores = {name: values / costs[name] for name, values in scores.items()}
        return solve(groups, scores.__getitem__, level.kept, share, Limits(least=alone))

    @property
    def statistics(self) -> dict[str, ConsumerStatistics]:
        return self._pass[1]

    @cached_property
    def norms(self) -> dict[str, NormStatistics]:
        """What the BatchNorms of the whole model read."""
        return norm_statistics(self.subject.model, self.batches)

    @cached_property
    def classes(self) -> ClassShares:
        """What the whole model gives each class."""
        return class_shares(self.subject.model, self.batches)

    @cached_property
    def _pass(self) -> tuple[dict[str, Elimination], dict[str, ConsumerStatistics]]:
        """Eliminations, and what the readers read."""
        model, groups = self.subject.model, self.subject.groups
        sums = ConsumerSums(model, groups, views_of(self.batches))
        found = eliminations(model, self.batches, groups, seed=self._seed, reads=sums)
        return found, sums.surveyed(self.subject.example)

    @cached_property
    def _eliminations(self) -> dict[str, Elimination]:
        """With the divergence measured, as the pruner does it."""
        model, groups = self.subject.model, self.subject.groups
        return measured(model, self.batches, groups, *self._pass, seed=self._seed)

    def _divergence(self, level: Level) -> tuple[Slice, float]:
        if level not in self._allocated:
            share = self.subject.shares[level.of]
            self._allocated[level] = allocate(
                self.subject.groups, self._eliminations, level.kept, share, Limits()
            )
        return self._allocated[level]

    def _in_our_numbers(self, scores: Scores, level: Level) -> tuple[Slice, float] | None:
        if any(values.isinf().all() for values in scores.values()):
            return None  # it does not rank all layers
        ours, _ = self._divergence(level)
        kept = {name: best(scores[name], int(mask.sum())) for name, mask in ours.kept.items()}
        critical = limited(Slice(kept, ours.groups), Limits(), scores.__getitem__)
        return critical, self.subject.shares[level.of](critical)

    def _scores_of(self, criterion: str) -> Scores | None:
        if criterion not in self._scores:
            self._scores[criterion] = (
                self._semantic() if criterion == SEMANTIC else self._rival(criterion)
            )
        return self._scores[criterion]

    def _semantic(self) -> Scores:
        known = profile_neurons(self.subject.model, self.batches, self.subject.neurons)
        scores = NSSImportance(known).scores
        return {name: values.double().cpu() for name, values in scores.items()}

    def _rival(self, criterion: str) -> Scores | None:
        gradients = None
        if criterion in GRADIENTS:
            gradients = GRADIENTS[criterion](self.subject.model, self.batches)
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            return self._ranker.scores(RIVALS[criterion](), gradients)


def by_rank(scores: Tensor) -> Tensor:
    """The share of the layer's neurons that score less: a threshold takes as much of each layer."""
    if scores.isinf().all():
        return scores
    return (scores.argsort(stable=True).argsort() + 0.5) / len(scores)


def neuron_costs(groups: tuple[NeuronGroup, ...], share: ShareOf) -> dict[str, float]:
    """Layer -> the share of the cost that one of its neurons takes in the whole model."""
    every = {group.name: torch.ones(group.size, dtype=torch.bool) for group in groups}
    whole = share(Slice(every, groups))
    costs = {}
    for name, kept in every.items():
        fewer = kept.clone()
        fewer[0] = len(kept) == 1
        cost = whole - share(Slice({**every, name: fewer}, groups))
        costs[name] = max(cost, torch.finfo(torch.float64).tiny)
    return costs


def best(scores: Tensor, count: int) -> Tensor:
    """True for the ``count`` neurons with the highest scores."""
    chosen = scores.argsort(descending=True, stable=True)[:count]
    return torch.zeros(len(scores), dtype=torch.bool).index_fill(0, chosen, True)


# What is left


def pruned(calibration: Calibration, critical: Slice, kind: str) -> nn.Module:
    """The smaller model of one kind."""
    model, parts = copy.deepcopy(calibration.subject.model), kind.split("-")
    if "folded" in parts:
        fold(model, critical, calibration.statistics)
    if "refit" in parts:
        refit(model, critical, calibration.batches)
    remove(model, critical, calibration.subject.example)
    by_channel(model)
    if "recalibrated" in parts:
        whole = kept_statistics(calibration.norms, critical)
        recalibrate(model, calibration.batches, whole=whole)
    if "balanced" in parts:
        balance(model, calibration.batches, calibration.classes)
    if "tuned" in parts:
        assert calibration.tuning is not None
        train(model, calibration.tuning.split, calibration.tuning.recipe, seed=0)
    return model


def by_channel(model: nn.Module) -> nn.Module:
    """The model with its channels laid out last: depthwise convolutions take half the time so."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Record:
    """The cells measured so far, and the file that keeps them."""

    def __init__(self, board: Board, options: dict[str, Any], path: Path, device: str) -> None:
        self.board = board
        self.options = options
        self.path = path
        self.device = device
        self.cells: list[Measured] = []
        self._known: set[tuple[int, Variant, str, str]] = set()

    def resume(self) -> None:
        """Take over what the file has.

        Raises:
            ArgumentError: It was measured in another way.
        """
        self.add(results.earlier(self.path, self.options, "cells", Measured))

    def add(self, cells: Sequence[Measured]) -> None:
        self.cells += cells
        for cell in cells:
            variant = Variant(cell.criterion, cell.allocation)
            self._known.add((cell.seed, variant, cell.level, cell.kind))

    def missing(self, seed: int, variant: Variant, level: Level, kinds: Sequence[str]) -> list[str]:
        """The kinds that are still to be measured."""
        return [kind for kind in kinds if (seed, variant, str(level), kind) not in self._known]

    def save(self) -> None:
        shown = columns(self.cells)
        results.write(
            self.path, self.title, shown, table_rows(self.cells), device=self.device,
            seeds=sorted({cell.seed for cell in self.cells}), options=self.options,
            summary=summary(self.cells), classes=class_drops(self.cells),
            agreement=agreements(self.cells),
            cells=[asdict(cell) for cell in self.cells],
        )  # fmt: skip

    @property
    def title(self) -> str:
        return f"Accuracy board, {self.board.name}"


def run_board(
    record: Record,
    data: Data,
    seeds: Sequence[int],
    variants: Sequence[Variant],
    kinds: Sequence[str],
    *,
    redraw: bool,
    cache: Path,
) -> None:
    """Measure all cells that the record lacks; prints a line on each variant and seed."""
    setting, device = record.board.setting, data.train.labels.device
    draws = {seed: [seed] for seed in seeds} if record.board.models else {0: seeds}
    for number, same in draws.items():
        found = trained(setting.name, setting.build, data, setting.recipe, number, cache, device)
        run_model(record, found.model, data, same, variants, kinds, redraw=redraw)


def run_model(
    record: Record,
    model: nn.Module,
    data: Data,
    seeds: Sequence[int],
    variants: Sequence[Variant],
    kinds: Sequence[str],
    *,
    redraw: bool,
) -> None:
    """Measure the cells of one model, for each draw of pictures."""
    board = record.board
    model = by_channel(model)
    if not running_norms(model):
        kinds = [kind for kind in kinds if "recalibrated" not in kind]
    tuning = Tuning(data.train, board.tuned)
    if not board.tuned.epochs:
        kinds = [kind for kind in kinds if kind not in TUNED]
    with suitable_threads(model):
        subject = subject_of(board, model, next(data.train.batches(2))[0])
        ranker = Ranker(subject)
        for seed in seeds:
            lacking = [
                (variant, level, missing)
                for variant in variants
                for level in board.levels
                if (missing := record.missing(seed, variant, level, kinds))
            ]
            if lacking:
                split, check = drawn(board, data, seed, redraw)
                calibration = Calibration(subject, ranker, seen(board, split), seed, tuning)
                measure(record, calibration, check, seed, lacking)


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
    pixels, labels = (
        torch.cat([getattr(s, part) for s in splits]) for part in ("pixels", "labels")
    )
    return replace(splits[0], pixels=pixels, labels=labels)


def measure(
    record: Record,
    calibration: Calibration,
    check: Split,
    seed: int,
    lacking: Sequence[tuple[Variant, Level, list[str]]],
) -> None:
    batch = record.board.batch
    whole = predictions(calibration.subject.model, check, batch)
    dense = share_equal(whole, check.labels)
    for variant, level, kinds in lacking:
        found = calibration.slice(variant, level)
        if found is None:
            continue
        critical, reached = found
        is_met = reached <= level.kept + TOLERANCE
        cells = []
        for kind in kinds:
            cell = Measured(
                seed, variant.criterion, variant.allocation, str(level), kind, reached, None, dense
            )
            if is_met:
                left = predictions(pruned(calibration, critical, kind), check, batch)
                cell = replace(
                    cell, accuracy=share_equal(left, check.labels),
                    class_drop=largest_drop(whole, left, check.labels),
                    agreement=share_equal(left, whole),
                )  # fmt: skip
            cells.append(cell)
        record.add(cells)
        record.save()
        print(line(variant, cells), flush=True)


def largest_drop(before: Tensor, after: Tensor, labels: Tensor) -> float:
    """The largest share of its samples that a class has lost."""
    classes = int(labels.max()) + 1
    first, second, samples = (
        torch.bincount(named, minlength=classes)
        for named in (labels[before == labels], labels[after == labels], labels)
    )
    return float(((first - second) / samples.clamp(min=1)).max())


def line(variant: Variant, cells: Sequence[Measured]) -> str:
    values = "  ".join(f"{c.kind} {results.show(percent(c.accuracy))}" for c in cells)
    return f"seed {cells[0].seed}  {variant!s:24}  {cells[0].level:15}  {values}"


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


# Tables and plot


def level_names(cells: Sequence[Measured]) -> list[str]:
    """MACs before parameters, and those that keep most first."""

    def place(name: str) -> tuple[str, float]:
        of, kept = name.split()
        return of, -float(kept)

    return sorted({cell.level for cell in cells}, key=place)


def columns(cells: Sequence[Measured]) -> tuple[Column, ...]:
    of_levels = (Column(name, name) for name in level_names(cells))
    return Column("criterion", "Criterion"), Column("kind", "kind"), *of_levels


def over_seeds(
    cells: Sequence[Measured], field: Field = "accuracy"
) -> dict[tuple[Variant, str, str], dict[int, float] | None]:
    """(variant, kind, level) -> seed -> percent; None where a budget was not met."""
    by_place: dict[tuple[Variant, str, str], dict[int, float | None]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        place = (Variant(cell.criterion, cell.allocation), cell.kind, cell.level)
        by_place.setdefault(place, {})[cell.seed] = getattr(cell, field)
    return {
        place: None
        if None in values.values()
        else {seed: 100 * value for seed, value in values.items() if value is not None}
        for place, values in by_place.items()
    }


def whole_accuracies(cells: Sequence[Measured]) -> dict[int, float]:
    """Seed -> that of the whole model in percent."""
    return {cell.seed: 100 * cell.dense for cell in sorted(cells, key=lambda cell: cell.seed)}


def rows_shown(cells: Sequence[Measured]) -> list[tuple[Variant, str]]:
    """Variant and kind of each row, in the order of the board."""

    def place(row: tuple[Variant, str]) -> tuple[int, int, int]:
        variant, kind = row
        allocation = ALLOCATIONS.index(variant.allocation)
        return CRITERIA.index(variant.criterion), allocation, KINDS.index(kind)

    rows = {(Variant(cell.criterion, cell.allocation), cell.kind) for cell in cells}
    return sorted(rows, key=place)


def table_rows(cells: Sequence[Measured]) -> list[dict[str, Cell]]:
    """The whole model, then a row for each variant and kind."""
    names, found = level_names(cells), over_seeds(cells)
    whole = spread(list(whole_accuracies(cells).values()))
    rows: list[dict[str, Cell]] = [{"criterion": WHOLE, **dict.fromkeys(names, whole)}]
    for variant, kind in rows_shown(cells):
        row: dict[str, Cell] = {"criterion": str(variant), "kind": kind}
        for name in names:
            values = found.get((variant, kind, name))
            row[name] = None if values is None else spread(list(values.values()))
        rows.append(row)
    return rows


def summary(cells: Sequence[Measured], field: Field = "accuracy") -> list[dict[str, Cell]]:
    """`divergence` against the best of the others, kind by kind, and each by its best kind:
    of those that are not trained on, and of those that are.

    The others are those that owe nothing to `divergence`; the lead is by the same seeds.
    """
    found, whole = over_seeds(cells, field), whole_accuracies(cells)
    kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in cells)]
    rows: list[dict[str, Cell]] = []
    for level in level_names(cells):
        for title, among in [*((kind, (kind,)) for kind in kinds), *BEST.items()]:
            entries = [
                (variant, kind, values)
                for (variant, kind, name), values in found.items()
                if name == level and kind in among and values is not None
            ]
            ours = [entry for entry in entries if entry[0].criterion == DIVERGENCE]
            others = [entry for entry in entries if entry[0].allocation != "ours"]
            if not ours or not others:
                continue
            _, _, mine = max(ours, key=lambda entry: statistics.fmean(entry[2].values()))
            rival, kind, theirs = max(others, key=lambda entry: statistics.fmean(entry[2].values()))
            leads = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
            rows.append(
                {
                    "level": level,
                    "kind": title,
                    "whole": spread([whole[seed] for seed in mine]),
                    "ours": spread(list(mine.values())),
                    "rival": f"{rival}, {kind}" if title in BEST else str(rival),
                    "theirs": spread(list(theirs.values())),
                    "lead": spread(leads) if leads else None,
                }
            )
    return rows


def agreements(cells: Sequence[Measured]) -> list[dict[str, Cell]]:
    """The summary of what agrees with the whole model, of the cells of which that is known."""
    known = [cell for cell in cells if cell.agreement is not None or cell.accuracy is None]
    return summary(known, "agreement")


def class_drops(cells: Sequence[Measured]) -> list[dict[str, Cell]]:
    """What balance does for `divergence`: by level and kind, the accuracy and what the class that
    loses most loses, without it and with it."""
    known: dict[tuple[str, str], list[Measured]] = {}
    for cell in cells:
        if cell.criterion == DIVERGENCE and cell.class_drop is not None:
            known.setdefault((cell.level, cell.kind), []).append(cell)
    rows: list[dict[str, Cell]] = []
    for level in level_names([cell for same in known.values() for cell in same]):
        for kind in KINDS:
            plain, balanced = known.get((level, kind)), known.get((level, f"{kind}-balanced"))
            if plain and balanced:
                row: dict[str, Cell] = {"level": level, "kind": kind}
                row["accuracy"], row["drop"] = kept_and_lost(plain)
                row["balanced"], row["balanced_drop"] = kept_and_lost(balanced)
                rows.append(row)
    return rows


def kept_and_lost(cells: Sequence[Measured]) -> tuple[Cell, Cell]:
    """The accuracy, and the loss of the class that loses most, in percent."""
    kept = [100 * cell.accuracy for cell in cells if cell.accuracy is not None]
    lost = [100 * cell.class_drop for cell in cells if cell.class_drop is not None]
    return spread(kept), spread(lost)


def plot(title: str, cells: Sequence[Measured], path: Path) -> None:
    """A panel for each kind and measure: a colour for a criterion, a style for an allocation."""
    found, names = over_seeds(cells), level_names(cells)
    measures = list(dict.fromkeys(name.split()[0] for name in names))
    kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in cells)]
    variants = list(dict.fromkeys(variant for variant, _ in rows_shown(cells)))
    height = max(3.6 * len(measures), 1.0 + 0.17 * len(variants))
    figure, panels = pyplot.subplots(
        len(measures), len(kinds), figsize=(3.8 * len(kinds) + 2, height),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    styles = dict(zip(ALLOCATIONS, (":", "-", "-.", "--"), strict=True))
    for panel_row, measure_name in zip(panels, measures, strict=True):
        here = [name for name in names if name.startswith(f"{measure_name} ")]
        for panel, kind in zip(panel_row, kinds, strict=True):
            for variant in variants:
                points = [
                    (100 * float(name.split()[1]), statistics.fmean(values.values()))
                    for name in here
                    if (values := found.get((variant, kind, name)))
                ]
                colour = f"C{CRITERIA.index(variant.criterion)}"
                is_ours = variant.criterion == DIVERGENCE
                style = "-" if is_ours else styles[variant.allocation]
                x, y = zip(*points, strict=True) if points else ((), ())
                panel.plot(x, y, style, color="black" if is_ours else colour, marker=".",
                           linewidth=2.5 if is_ours else 1.0, label=str(variant))  # fmt: skip
            panel.set(title=kind, xlabel=f"{measure_name} kept, %")
            panel.invert_xaxis()
            panel.grid(alpha=0.3)
        panel_row[0].set(ylabel="accuracy, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.suptitle(title)
    save_figure(figure, path)


def report(record: Record, data: Data) -> None:
    """Print the tables of a board, and draw its plot."""
    if not record.cells:
        print(f"{record.title}: none of the criteria ranks the neurons")
        return
    record.save()
    image = record.path.with_suffix(".png")
    plot(record.title, record.cells, image)
    rows, gains = table_rows(record.cells), summary(record.cells)
    print(f"\n{record.title}; data: {data.origin}; accuracy %, mean ± deviation over seeds\n")
    print(results.text_table(columns(record.cells), rows))
    if gains:
        print(f"\n{results.text_table(SUMMARY_COLUMNS, gains)}")
    if agreeing := agreements(record.cells):
        print("\nagreement with the whole model, %\n")
        print(results.text_table(AGREEMENT_COLUMNS, agreeing))
    print(f"\n{record.path} and {image.name} written\n")


# The command line


def parser() -> argparse.ArgumentParser:
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
        help=f"comma list of {', '.join(CRITERIA)}, or all (default: %(default)s)")  # fmt: skip
    add("--allocations", default="local,global,ours",
        help=f"comma list of {', '.join(ALLOCATIONS)}, or all (default: %(default)s)")  # fmt: skip
    add("--kinds", default="plain,recalibrated,folded,folded-recalibrated",
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


def named(what: str, names: str, known: Sequence[str]) -> list[str]:
    """What a comma-separated list names, in the order of the board ("all": every one)."""
    wanted = list(known) if names == "all" else names.split(",")
    for name in wanted:
        if name not in known:
            raise ArgumentError(f"There is no {what} {name!r}; there are: {', '.join(known)}.")
    return [name for name in known if name in wanted]


def chosen_variants(criteria: Sequence[str], allocations: Sequence[str]) -> Iterator[Variant]:
    """Every criterion with every allocation; ours has its own alone."""
    for criterion in criteria:
        if criterion == DIVERGENCE:
            yield Variant(DIVERGENCE, "ours")
        else:
            yield from (Variant(criterion, allocation) for allocation in allocations)


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
    try:
        return [float(word) for word in words.split(",")]
    except ValueError as error:
        raise ArgumentError(f"{words!r} is no comma list of numbers, such as 0.9,0.8.") from error


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    seeds, device = checked_seeds(asked.seeds), usable_device(asked.device)
    kinds = named("kind", asked.kinds, KINDS)
    variants = list(
        chosen_variants(
            named("criterion", asked.criteria, CRITERIA),
            named("allocation", asked.allocations, ALLOCATIONS),
        )
    )
    boards = [
        adapted(BOARDS[name], asked) for name in named("setting", asked.settings, list(BOARDS))
    ]
    for board in boards:
        data = load(board.setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        options = {
            "calibrated": board.calibrated, "evaluated": asked.evaluated, "redraw": asked.redraw,
            "recipe": asdict(board.setting.recipe), "tuned": asdict(board.tuned),
            "data": data.origin,
        }  # fmt: skip
        path = asked.output / f"accuracy-{board.name}.json"
        record = Record(board, options, path, device)
        if not asked.fresh:
            record.resume()
        run_board(record, data, seeds, variants, kinds, redraw=asked.redraw, cache=asked.cache)
        report(record, data)
