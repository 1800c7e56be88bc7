"""The training loop and its settings."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import Tensor, nn

from nss_prune.errors import ArgumentError
from nss_prune.training.learner import Learner
from nss_prune.training.logs import CSVLog, TensorBoardLog, logs_in
from nss_prune.training.loop import train
from nss_prune.training.progress import Progress
from nss_prune.training.settings import TrainingArguments, TrainingSettings, described


class Nowhere:
    """A checkpoint that is not kept."""

    def save(self, notes: object, best: object = None) -> None:
        pass

    def load(self) -> None:
        return None


class Weighted(Learner):
    """y = w x, to be 0; w halves where the rate is 1 / (4 x²)."""

    def __init__(self, rate: float, momentum: float = 0.0) -> None:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        super().__init__(model, torch.optim.SGD(model.parameters(), rate, momentum))
        self.rates: list[float] = []

    def loss(self, batch: Tensor, number: int) -> Tensor:
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return self.model(batch).square().mean()


def run(learner: Learner, data: list[Tensor], **settings: object) -> Progress:
    return train(learner, data, TrainingSettings(**settings), saved=Nowhere(), progress=False)


def test_the_keywords_are_those_of_the_settings() -> None:
    assert list(get_type_hints(TrainingArguments)) == [f.name for f in fields(TrainingSettings)]


def test_losses_and_weights_are_those_on_paper() -> None:
    learner = Weighted(0.25)
    done = run(learner, [torch.ones(1, 1), torch.ones(1, 1)], epochs=2)
    # w: 1, 1/2, 1/4, 1/8, 1/16; the loss is w² before each step.
    assert done.losses == ((1 + 1 / 4) / 2, (1 / 16 + 1 / 64) / 2)
    assert float(learner.model.weight.detach()) == 1 / 16
    assert [m["learning_rate"] for m in done.history] == [0.25, 0.25]
    assert learner.model.weight.grad is None


def test_gradients_are_clipped_to_their_norm() -> None:
    learner = Weighted(1.0)
    run(learner, [torch.ones(1, 1)], epochs=1, clip_norm=0.5)  # the gradient is 2
    assert float(learner.model.weight.detach()) == pytest.approx(0.5, abs=1e-5)


def test_a_schedule_warms_up_and_falls() -> None:
    learner = Weighted(0.1)
    run(learner, [torch.ones(1, 1)], epochs=10, scheduler="cosine", warmup_epochs=3)
    rates = learner.rates
    assert rates[0] == pytest.approx(1e-5)
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    # timm's cosine counts the epochs of the warm-up among its own.
    assert rates[5] == pytest.approx(0.05)


def test_a_table_of_a_resumed_training_goes_on(tmp_path: Path) -> None:
    log = CSVLog(tmp_path / "new" / "history.csv")
    for epoch in (1, 2, 3, 2, 3):
        log({"epoch": epoch, "loss": epoch / 2})
    log({"epoch": 4, "loss": 0.1, "score": 0.5})
    with log.path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["score"] for row in rows] == ["", "", "", "0.5"]
    assert [path.name for path in log.path.parent.iterdir()] == ["history.csv"]


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    *_, log = logs_in(tmp_path)
    assert isinstance(log, TensorBoardLog)
    log({"epoch": 1, "loss": 0.5})
    log({"epoch": 2, "loss": 0.25})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_values_are_described_alike_in_every_run() -> None:
    assert described(torch.bfloat16) == "torch.bfloat16"
    assert described(nn.CrossEntropyLoss()) == "torch.nn.modules.loss.CrossEntropyLoss"
    assert described(nn.functional.cross_entropy) == "torch.nn.functional.cross_entropy"


def test_settings_that_do_not_exist_are_named() -> None:
    with pytest.raises(ArgumentError, match="'epoch'; a training takes epochs, optimizer"):
        TrainingSettings.of({"epoch": 3})
