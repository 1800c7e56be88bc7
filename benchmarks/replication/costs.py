"""What a piece costs: its work in samples trained, times the measured seconds of a sample."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks.common.data import Data
from benchmarks.common.settings import Setting
from benchmarks.common.storage import written_aside
from benchmarks.common.training import digest, initialised, train
from benchmarks.learners.readapted import SAMPLES, strength_for
from benchmarks.published import slicing
from benchmarks.replication.pieces import Piece
from benchmarks.reports.rq1 import LIGHT, RATIOS, THETAS
from benchmarks.reports.rq3 import METHODS
from benchmarks.rq3 import EPOCHS
from benchmarks.rq4 import split_tasks
from nss_prune.profiling.contributions.protocol import metrics_known

FORWARD = 1 / 3  # of the work of a sample trained, which goes forward and twice backward
ITERATIONS = 45  # of a run of RQ2, about: r = 5 % leaves a tenth of the weights by then
REPLAYED = {"original": -1.0, "replay-5": 0.05, "replay-10": 0.1, "replay-100": 1.0,
            "neusemslice-replay-10": 0.1}  # fmt: skip
"""RQ4's methods -> samples of task A that they train on, in samples of task B."""


@dataclass(frozen=True)
class Subject:
    """A setting as it trains on a device, its data there, and the seconds of a sample trained."""

    setting: Setting
    data: Data
    seconds: float

    @property
    def device(self) -> torch.device:
        return self.data.train.labels.device

    def training_data(self, piece: Piece) -> Data:
        """What the piece's model is trained with."""
        return split_tasks(self.data, 2)[0].data if piece.question == "rq4" else self.data

    def training(self, piece: Piece) -> float:
        """Seconds that the training of the piece's model takes."""
        samples = len(self.training_data(piece).train)
        return self.seconds * self.setting.recipe.epochs * samples

    def is_trained(self, piece: Piece, cache: Path, seed: int) -> bool:
        """Whether the cache has the piece's model."""
        recipe, data = self.setting.recipe, self.training_data(piece)
        key = digest(initialised(self.setting.build, seed), data, recipe)
        return (cache / "models" / f"{piece.model}-seed{seed}-{key}.pt").exists()

    def work(self, piece: Piece) -> float:
        """Samples trained that take about as long as the piece does, beside its training."""
        return WORK[piece.question](self, piece)


def sample_seconds(setting: Setting, data: Data) -> float:
    """The seconds that the training of a sample takes, measured on some steps after a first one."""
    steps = 10 if data.train.labels.device.type == "cuda" else 2
    batch = min(setting.recipe.batch, len(data.train))
    model = initialised(setting.build, 0).to(data.train.labels.device)
    one = replace(setting.recipe, epochs=1)
    few = data.train.subset(torch.arange(batch, device=data.train.labels.device))
    train(model, few, one, seed=0)
    _wait(few.labels.device)
    start = time.perf_counter()
    train(model, few, replace(one, epochs=steps), seed=0)
    _wait(few.labels.device)
    return (time.perf_counter() - start) / (steps * batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def slicing_work(subject: Subject, piece: Piece) -> float:
    """A profile by all metrics, and every slice measured on the test data."""
    metrics = len(metrics_known())
    slices = metrics * (len(THETAS) + len(LIGHT) + 2 * len(RATIOS))
    return profile_work(subject, metrics) + FORWARD * slices * len(subject.data.test)


def profile_work(subject: Subject, metrics: int = 1) -> float:
    classes = len(subject.data.train.labels.unique())
    return metrics * min(len(subject.data.train), classes * subject.setting.profiled)


def restructuring_work(subject: Subject, piece: Piece) -> float:
    """The check and test data after each iteration, of every method alone and after slicing."""
    measured = len(subject.data.check) + len(subject.data.test)
    runs = 2 * len(slicing.METHODS)
    return profile_work(subject) + FORWARD * runs * ITERATIONS * measured


def readaptation_work(subject: Subject, piece: Piece) -> float:
    """The new samples and their adversaries, by every method and attack, and the attacks."""
    trained = 2 * EPOCHS * SAMPLES * 2 * len(METHODS)
    attacks = 2 * SAMPLES * (1 + len(METHODS)) * (1 + strength_for(subject.data).steps)
    return profile_work(subject) + trained + attacks


def development_work(subject: Subject, piece: Piece) -> float:
    """Task B, learned as the model learned task A, with the samples that the method replays."""
    share = 1 + REPLAYED.get(piece.method or "", 0.0)
    samples = len(subject.data.train) / 2 * subject.setting.recipe.epochs * share
    return samples + FORWARD * 3 * len(subject.data.test) + profile_work(subject)


WORK: Mapping[str, Callable[[Subject, Piece], float]] = {
    "rq1": slicing_work,
    "rq2": restructuring_work,
    "rq3": readaptation_work,
    "rq4": development_work,
}


@dataclass(frozen=True)
class Measured:
    """What a piece took, training aside, and what its work alone would have let expect.

    device: "cpu" or "cuda".
    """

    piece: str
    device: str
    seconds: float
    expected: float

    @property
    def question(self) -> str:
        return self.piece.partition(" ")[0]


class Ledger:
    """The pieces measured so far, in a file: later estimates follow them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = json.loads(path.read_text("utf-8")) if path.exists() else []
        self.entries = [Measured(**line) for line in lines]

    def add(self, entry: Measured) -> None:
        """Keep one more, in the place of an earlier one of the same piece and device."""
        key = (entry.piece, entry.device)
        self.entries = [one for one in self.entries if (one.piece, one.device) != key]
        self.entries.append(entry)
        with written_aside(self.path) as aside:
            aside.write_text(json.dumps([asdict(one) for one in self.entries], indent=1), "utf-8")

    def factor(self, question: str, device: str) -> float:
        """How many times as long as expected such pieces took there: the median; 1 without any."""
        ratios = [
            entry.seconds / entry.expected
            for entry in self.entries
            if (entry.question, entry.device) == (question, device) and entry.expected > 0
        ]
        return statistics.median(ratios) if ratios else 1.0
