"""What a step of RQ3 costs where the critical neurons train, against one of the whole model."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from benchmarks.common.data import Data, load
from benchmarks.common.settings import SETTINGS, Setting
from benchmarks.common.storage import DEFAULT_CACHE
from benchmarks.common.timing import Rows, ratio_row, show
from benchmarks.common.training import initialised, make_optimiser, suitable_threads, trained
from benchmarks.learners.readapted import Course, Subject, new_samples
from benchmarks.rq3 import precision
from nss_prune.adaptation.adversarial_loss import AdversarialLoss
from nss_prune.adaptation.adversarial_training import AdversarialTraining
from nss_prune.adaptation.freezing import Freezing, train_all, train_critical
from nss_prune.training.loop import Steps
from nss_prune.training.settings import TrainingSettings

CASES = ("mlp-digits", "mlp-mnist", "alexnet-quarter-cifar10")
UNTRAINED = ("alexnet-quarter-cifar10",)  # its steps take as long, and its training hours
BATCHES = 4  # that are timed together

Batch = tuple[tuple[Tensor, Tensor], Tensor]


def readaptation(repeats: int, folder: Path | None, cache: Path = DEFAULT_CACHE) -> Rows:
    """By the seconds of the processor, which others on a busy machine disturb less."""
    rows: Rows = []
    for name in CASES:
        setting = SETTINGS[name]
        data = load(setting.data, folder, cache=cache)
        model = model_of(setting, data, cache)
        subject = Subject(name, 0, model, data, Course(setting.recipe), min(setting.profiled, 200))
        batches: list[Batch] = [
            ((x, x + 0.01), y) for x, y in new_samples(data, setting.recipe)[:BATCHES]
        ]
        sides = [copy.deepcopy(model) for _ in range(2)]
        parts = (train_critical(subject.sliced.critical, sides[0]), train_all(sides[1]))
        with suitable_threads(model), contextlib.ExitStack() as stack:
            ours, other = (stepper(setting, part, batches, stack) for part in parts)
            times = in_turn(ours, other, repeats)
        what = f"{name}, {100 * parts[0].share:.0f} % of the parameters train"
        rows.append(ratio_row(what, *times, "<= 1", faster=False))
        show(rows[-1])
    return rows


def model_of(setting: Setting, data: Data, cache: Path) -> nn.Module:
    """The setting's model, trained where that is quick."""
    if setting.name in UNTRAINED:
        return initialised(setting.build, 0)
    return trained(setting.name, setting.build, data, setting.recipe, 0, cache).model


def stepper(
    setting: Setting, part: Freezing, batches: list[Batch], stack: contextlib.ExitStack
) -> Callable[[], object]:
    """A function that trains a part of a model on the batches, as ReadaptTrainer does."""
    settings = TrainingSettings.of(
        {
            "optimizer": functools.partial(make_optimiser, recipe=setting.recipe),
            "amp": precision(part.model),
        }
    )
    objective = AdversarialLoss(part.model, unattacked, fixed=True)
    learner = AdversarialTraining(part, settings, objective)
    stack.enter_context(learner.attach())
    return functools.partial(Steps(learner, settings, False).take, batches, "steps")


def unattacked(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Never called: the batches bring their adversaries."""
    return inputs


def in_turn(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of the processor of both, A B B A ..., after one run of each that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    sides = list(zip((first, second), times, strict=True))
    for repeat in range(repeats + 1):
        for function, found in sides if repeat % 2 else sides[::-1]:
            start = time.process_time()
            function()
            if repeat:
                found.append(time.process_time() - start)
    return times
