"""Fine-tuning: against loops and formulas written by hand."""

from __future__ import annotations

import copy
import csv
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from networks import assert_unchanged, fingerprint
from nss_prune import NSSPruner, finetune
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError, NumericalError
from nss_prune.finetuning.distillation import similarity_loss, soft_loss
from processes import in_processes

Batches = list[tuple[Tensor, Tensor]]


def network(hidden: int = 12, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 3)
    )


def samples(seed: int = 0, count: int = 48) -> Batches:
    """The class is the largest of the first three inputs."""
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    labels = inputs[:, :3].argmax(1)
    return list(zip(inputs.split(16), labels.split(16), strict=True))


def plain(**more: Any) -> dict[str, Any]:
    """Plain SGD in the arguments of finetune."""
    return {
        "optimizer": lambda p: torch.optim.SGD(p, 0.1),
        "scheduler": None,
        "progress": False,
        **more,
    }


def by_hand(model: nn.Module, data: Batches, epochs: int, loss: Any = cross_entropy) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    for _ in range(epochs):
        for inputs, labels in data:
            optimizer.zero_grad()
            # Cross entropy of the package is a sum over the samples, divided by their number.
            loss(model(inputs), labels).backward()
            optimizer.step()
    return model


def total_over_count(outputs: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(outputs, labels, reduction="sum") / len(labels)


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_plain_sgd_is_the_loop_written_by_hand_bit_for_bit() -> None:
    model, wanted = network(), by_hand(network(), samples(), 3, total_over_count)
    result = finetune(model, samples(), epochs=3, **plain())
    assert_same(model, wanted)
    assert result.epochs == 3
    assert result.best_epoch is None
    assert [metrics["epoch"] for metrics in result.history] == [1, 2, 3]
    assert result.history[2]["loss"] < result.history[0]["loss"]
    assert result.metrics == result.history[-1]


def test_the_distillation_loss_is_its_formula() -> None:
    torch.manual_seed(0)
    found, wanted = torch.randn(5, 4), torch.randn(5, 4)
    expected = 0.0
    for s, t in zip(found.double(), wanted.double(), strict=True):
        p, q = (t / 3).exp() / (t / 3).exp().sum(), (s / 3).exp() / (s / 3).exp().sum()
        expected += float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))) / 5
    assert float(soft_loss(found, wanted, 3.0)) == pytest.approx(9 * expected, rel=1e-4)


def test_the_similarity_loss_is_its_formula() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3), torch.randn(4, 5, 2)
    grams = []
    for features in (student.double(), teacher.double()):
        rows = [features[i].flatten() for i in range(4)]
        gram = [[float(a @ b) for b in rows] for a in rows]
        grams.append([[v / math.sqrt(sum(w * w for w in row)) for v in row] for row in gram])
    expected = sum((grams[0][i][j] - grams[1][i][j]) ** 2 for i in range(4) for j in range(4))
    assert float(similarity_loss(student, teacher)) == pytest.approx(expected / 16, rel=1e-4)
    assert float(similarity_loss(teacher, teacher)) == 0


@pytest.mark.parametrize("features", [0.0, 3.0])
def test_one_step_of_distillation_is_the_gradient_of_the_formula(features: float) -> None:
    teacher, model = network(seed=1), network(8)
    teacher.train()
    wanted, before = copy.deepcopy(model), fingerprint(teacher)
    inputs, labels = samples()[0]
    teacher_copy = copy.deepcopy(teacher).eval()
    with torch.no_grad():
        scores = teacher_copy(inputs)
        hidden = teacher_copy[:3](inputs)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        found = 0.7 * soft_loss(outputs, scores, 4.0) + 0.3 * total_over_count(outputs, labels)
        if not features:
            return found
        # In training mode, as outputs are; without a second update of the statistics.
        normed = nn.functional.batch_norm(
            wanted[0](inputs), None, None, wanted[1].weight, wanted[1].bias, training=True
        )
        return found + features * similarity_loss(normed.relu(), hidden)

    by_hand(wanted, [(inputs, labels)], 1, loss)
    finetune(
        model, [(inputs, labels)], teacher, epochs=1, distillation=0.7, temperature=4.0,
        features=features, **plain(),
    )  # fmt: skip
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert_unchanged(teacher, before)


def test_a_teacher_alone_needs_no_labels() -> None:
    teacher, model = network(seed=1), network(8)
    unlabelled = [inputs for inputs, _ in samples()]
    result = finetune(model, unlabelled, teacher, epochs=20, distillation=1.0, **plain())
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2
    with pytest.raises(DataError, match="labels"):
        finetune(model, unlabelled, teacher, epochs=1, **plain())


def test_a_pruned_model_learns_from_the_whole_one() -> None:
    whole = by_hand(network(32), samples(count=480), 30)
    model = copy.deepcopy(whole)
    NSSPruner(model, samples()[0][0], macs_budget=0.3, data=samples(), progress=False).step()
    result = finetune(
        model, samples(count=480), whole, samples(seed=2), features=1.0, epochs=5, progress=False
    )
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.metrics["accuracy"] == max(m["accuracy"] for m in result.history) > 0.8


class Interrupted(Exception):
    pass


class Interrupting:
    def __init__(self, data: Batches, passes: int) -> None:
        self.data, self.passes = data, passes

    def __iter__(self):
        self.passes -= 1
        for batch in self.data:
            yield batch
            if self.passes == 0:
                raise Interrupted


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler")
@pytest.mark.parametrize("scheduler", ["cosine", "plateau", None])
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_a_resumed_finetuning_ends_where_an_unbroken_one_does(
    optimizer: str, scheduler: str | None, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "teacher": network(seed=1), "validation": samples(seed=3), "optimizer": optimizer,
        "scheduler": scheduler, "epochs": 5, "mixup": 0.4, "cutmix": 0.0, "smoothing": 0.1,
        "ema": 0.9, "progress": False, "clip_norm": 1.0, "amp": torch.bfloat16,
    }  # fmt: skip
    model, other = network(), network()
    torch.manual_seed(3)
    whole = finetune(model, samples(), **arguments)
    torch.manual_seed(3)
    path = tmp_path / "checkpoint"
    before = fingerprint(other)
    with pytest.raises(Interrupted):
        finetune(other, Interrupting(samples(), 5), checkpoint=path, **arguments)
    assert_unchanged(other, before)
    torch.manual_seed(99)
    result = finetune(other, samples(), checkpoint=path, resume=True, **arguments)
    assert_same(model, other)
    for one, two in zip(whole.history, result.history, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 0.5}, {"temperature": 3.0}, {"ema": 0.5}, {"epochs": 9}, {"mixup": 0.1},
     {"optimizer": "sgd"}, {"loss": "SoftTargetCrossEntropy"}],
)  # fmt: skip
def test_a_checkpoint_of_other_hyper_parameters_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path, model = tmp_path / "checkpoint", network()
    arguments: dict[str, Any] = {"teacher": network(seed=1), "epochs": 1, "progress": False}
    finetune(model, samples(), checkpoint=path, **arguments)
    before = fingerprint(model)
    name = {"learning_rate": "lr 0.001", "temperature": "temperature 2.0"}.get(*change, *change)
    with pytest.raises(ModelMismatchError, match=f"another training: .*{name}"):
        finetune(model, samples(), checkpoint=path, resume=True, **{**arguments, **change})
    assert_unchanged(model, before)


def test_training_stops_early_and_the_best_values_come_back() -> None:
    seen: list[dict[str, Tensor]] = []
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])

    def validate(model: nn.Module) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"loss of mine": -next(scores)}

    model = network()
    result = finetune(
        model, samples(), validation=validate, epochs=9, patience=2, monitor="-loss of mine",
        **plain(),
    )  # fmt: skip
    assert result.stopped_early
    assert result.epochs == 4
    assert result.best_epoch == 2
    assert result.metrics["score"] == 0.5
    for name, value in seen[1].items():
        assert torch.equal(model.state_dict()[name], value)


def test_the_average_is_that_of_timm_after_the_first_step() -> None:
    from timm.utils import ModelEmaV3

    wanted = network()
    optimizer, average = torch.optim.SGD(wanted.parameters(), 0.1), None
    wanted.train()
    for inputs, labels in samples() * 2:
        optimizer.zero_grad()
        total_over_count(wanted(inputs), labels).backward()
        optimizer.step()
        if average is None:
            average = ModelEmaV3(wanted, decay=0.7)
        else:
            average.update(wanted)
    model = network()
    finetune(model, samples(), epochs=2, ema=0.7, **plain())
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], value)
    for name, value in wanted.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], value)


def test_metrics_logs_and_callbacks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Least:
        """A metric as torchmetrics has them: the least score of a right class."""

        def reset(self) -> None:
            self.value = math.inf

        def update(self, scores: Tensor, labels: Tensor) -> None:
            self.value = min(self.value, float(scores.gather(1, labels[:, None]).min()))

        def compute(self) -> Tensor:
            return torch.tensor(self.value)

    model, told = network(), []
    with caplog.at_level(logging.INFO, "nss_prune"):
        result = finetune(
            model, samples(), validation=samples(seed=2), epochs=2, metrics={"least": Least()},
            monitor="least", log=tmp_path / "logs", on_epoch=told.append, **plain(),
        )  # fmt: skip
    assert tuple(told) == result.history
    assert result.metrics["score"] == result.metrics["least"]
    model.eval()
    inputs, labels = (torch.cat(parts) for parts in zip(*samples(seed=2), strict=True))
    right = float((model(inputs).argmax(1) == labels).float().mean())
    assert result.metrics["accuracy"] == pytest.approx(right)
    with (tmp_path / "logs" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [m["loss"] for m in result.history]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("epoch 1/2: loss ")
    assert "accuracy" in messages[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distillation": 1.5, "teacher": network()}, "distillation"),
        ({"temperature": 0.0, "teacher": network()}, "temperature"),
        ({"features": -1.0, "teacher": network()}, "features"),
        ({"mixup": -1.0}, "mixup"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"ema": 1.0}, "ema"),
        ({"loss": "NoSuchLoss"}, "BinaryCrossEntropy"),
        ({"scheduler": "no such"}, "scheduler"),
        ({"optimizer": "no such"}, "optimiser"),
        ({"patience": 2}, "validation"),
        ({"epoch": 2}, "takes epochs"),
        ({"validation": samples(), "monitor": "f1"}, "there are accuracy"),
    ],
)
def test_arguments_outside_what_they_may_be_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    model = network()
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=message):
        finetune(model, samples(), **{"epochs": 1, "progress": False, **arguments})
    assert_unchanged(model, before)


def test_teachers_that_do_not_fit_are_refused() -> None:
    model = network()
    with pytest.raises(ArgumentError, match="deepcopy"):
        finetune(model, samples(), model)
    with pytest.raises(ModelMismatchError, match="fewer channels"):
        finetune(model, samples(), network(), features=1.0)
    with pytest.raises(DataError, match="same classes"):
        finetune(model, samples(), nn.Linear(6, 4), progress=False)


def test_what_goes_wrong_leaves_the_model_as_it_was() -> None:
    model = network()
    before = fingerprint(model)
    broken = [(inputs * math.nan, labels) for inputs, labels in samples()]
    for data, error in ((broken, NumericalError), ([], DataError), (iter(samples()), DataError)):
        with pytest.raises(error):
            finetune(model, data, epochs=1, **plain())
        assert_unchanged(model, dict(before))


def part(rank: int, folder: str) -> None:
    model = nn.Linear(6, 3)  # without norms, whose statistics are those of the first process
    own = [(inputs[8 * rank :][:8], labels[8 * rank :][:8]) for inputs, labels in samples()]
    torch.manual_seed(rank)
    nn.init.normal_(model.weight)
    result = finetune(model, own, validation=own, epochs=2, **plain())
    torch.save({**model.state_dict(), "score": result.metrics["score"]}, f"{folder}/{rank}")


def test_processes_average_their_gradients_and_end_with_the_same_model(tmp_path: Path) -> None:
    in_processes(part, tmp_path)
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in "01")
    assert first["score"] == second["score"]
    wanted = nn.Linear(6, 3)
    torch.manual_seed(0)
    nn.init.normal_(wanted.weight)
    for name in ("weight", "bias"):
        assert torch.equal(first[name], second[name])
