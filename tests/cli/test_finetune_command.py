"""``nss-prune finetune`` writes what the function makes, and goes on where it was."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch

from nss_prune import finetune, load_pruned
from nss_prune.cli.commands import finetune as command
from nss_prune.cli.main import DONE, INTERRUPTED, REFUSED, main
from nss_prune.cli.objects import imported
from nss_prune.cli.training import TRAINING_OPTIONS
from nss_prune.finetuning.recipe import Recipe
from nss_prune.training.settings import TrainingSettings

Own = Callable[[str], str]


@pytest.fixture
def small(folder: Path, own: Own) -> str:
    """A pruned file of the model of one's own."""
    typed = ["prune", own("model"), "--data", own("data"), "--params-budget", "0.5"]
    assert main([*typed, "-o", "small.safetensors", "--quiet"]) == DONE
    return "small.safetensors"


def test_the_file_has_what_the_function_makes(
    small: str, own: Own, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [
        "finetune", small, "--structure", own("model"), "--teacher", own("model"), "--data",
        own("data"), "--eval-data", own("data"), "--epochs", "3", "--optimizer", own("sgd"),
        "--scheduler", "none", "--distillation", "0.7", "-o", "tuned.safetensors", "--json",
    ]  # fmt: skip
    capsys.readouterr()
    assert main(typed) == DONE
    told = capsys.readouterr()
    values = json.loads(told.out)

    whole, data = imported(own("model"))(), imported(own("data"))()
    wanted = load_pruned(small, imported(own("model"))())
    result = finetune(
        wanted, data, whole, data, epochs=3, optimizer=imported(own("sgd")), scheduler=None,
        distillation=0.7, progress=False,
    )  # fmt: skip
    found = load_pruned("tuned.safetensors", imported(own("model"))())
    for name, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert values["best_epoch"] == result.best_epoch
    assert values["accuracy"][1] == result.metrics["accuracy"]
    assert [metrics["loss"] for metrics in values["history"]] == [
        metrics["loss"] for metrics in result.history
    ]
    assert "epoch 3/3" in told.err
    assert "export tuned.safetensors" in values["next"]
    written = json.loads(Path("tuned.json").read_text())
    assert written["history"] == values["history"]
    assert "--distillation 0.7" in written["command"]


def test_a_timm_model_with_pictures_from_its_configuration(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(timm.create_model("resnet10t", num_classes=4).state_dict(), tmp_path / "w.pth")
    small, tuned = tmp_path / "small.safetensors", tmp_path / "tuned.safetensors"
    shared = [
        "--num-classes", "4", "--data", str(pictures), "--input-size", "3", "32", "32",
        "--weights", str(tmp_path / "w.pth"),
    ]  # fmt: skip
    assert main(["prune", "resnet10t", *shared, "--macs-budget", "0.6", "-o", str(small)]) == DONE
    typed = [
        "finetune", str(small), "--teacher", "resnet10t", *shared, "--epochs", "2", "--amp",
        "bfloat16", "--ema", "0.9", "--augment", "--batch-size", "8", "--log",
        str(tmp_path / "log"), "-o", str(tuned),
    ]  # fmt: skip
    assert main(typed) == DONE
    assert "2 epochs in" in capsys.readouterr().out
    shapes = {name: value.shape for name, value in load_pruned(small).state_dict().items()}
    assert shapes == {name: value.shape for name, value in load_pruned(tuned).state_dict().items()}
    assert (tmp_path / "log" / "history.csv").exists()

    again = tmp_path / "again.safetensors"
    config = ["finetune", "--config", str(tmp_path / "tuned.yaml"), "-o", str(again), "--quiet"]
    assert main(config) == DONE
    for name, value in load_pruned(tuned).state_dict().items():
        assert torch.equal(load_pruned(again).state_dict()[name], value), name


def test_it_goes_on_from_a_checkpoint_and_refuses_another_training(
    small: str, own: Own, capsys: pytest.CaptureFixture[str]
) -> None:
    def typed(epochs: int, output: str, *more: str) -> list[str]:
        return [
            "finetune", small, "--structure", own("model"), "--data", own("data"), "--scheduler",
            "none", "--epochs", str(epochs), "-o", output, *more,
        ]  # fmt: skip

    going_on = ["--checkpoint", "c.safetensors", "--resume"]
    assert main(typed(4, "straight.safetensors")) == DONE
    assert main(typed(2, "half.safetensors", *going_on)) == DONE
    assert main(typed(4, "whole.safetensors", *going_on)) == DONE
    straight, whole = (
        load_pruned(name, imported(own("model"))())
        for name in ("straight.safetensors", "whole.safetensors")
    )
    for name, value in straight.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name
    before = sorted(Path().iterdir())
    other = typed(6, "other.safetensors", *going_on, "--learning-rate", "0.1")
    assert main(other) == REFUSED
    assert "lr" in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


def test_ctrl_c_leaves_no_file(
    small: str, own: Own, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "finetune", interrupted)
    before = sorted(Path().iterdir())
    typed = ["finetune", small, "--structure", own("model"), "--data", own("data"), "-o", "t"]
    assert main(typed) == INTERRUPTED
    assert sorted(Path().iterdir()) == before


def test_every_argument_of_the_function_can_be_given() -> None:
    arguments = {field.name for of in (TrainingSettings, Recipe) for field in fields(of)}
    arguments |= set(inspect.signature(finetune).parameters)
    elsewhere = {"model", "data", "teacher", "validation", "progress", "resume", "arguments"}
    functions = {"on_epoch"}
    known = {option.name for option in TRAINING_OPTIONS}
    assert arguments - elsewhere - functions == known
