"""The commands, each as it is typed, on small models and pictures."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
import yaml
from torch import nn

from nss_prune import NSSPruner, load_pruned, save_pruned
from nss_prune.cli.commands import prune
from nss_prune.cli.main import DONE, INTERRUPTED, REFUSED, USAGE, main
from nss_prune.cli.options import PRUNER_OPTIONS
from nss_prune.errors import ArgumentError

Own = Callable[[str], str]


def test_prune_a_timm_model_with_a_folder_of_pictures(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = timm.create_model("resnet10t", num_classes=4).state_dict()
    torch.save({"state_dict": weights}, tmp_path / "weights.pth")
    small, page = tmp_path / "small.safetensors", tmp_path / "report.html"
    typed = [
        "prune", "resnet10t", "--num-classes", "4", "--weights", str(tmp_path / "weights.pth"),
        "--data", str(pictures), "--input-size", "3", "32", "32", "--macs-budget", "0.6",
        "--held-out", "0.5", "-o", str(small), "--report", str(page), "--folder",
        str(tmp_path / "hub"), "--json",
    ]  # fmt: skip
    assert main(typed) == DONE
    told = capsys.readouterr()
    values = json.loads(told.out)
    assert values["next"]
    report = values["report"]
    assert report["after"]["macs"] <= 0.6 * report["before"]["macs"]
    assert len(report["figures"]["accuracy"]) == 2
    assert all(seconds > 0 for seconds in report["figures"]["latency"])
    assert "6/7 timing both models in turns" in told.err
    assert "4/7 pruning" in told.err
    assert "measuring" in told.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hub", "report.html", "small.json", "small.safetensors", "small.yaml", "weights.pth",
    ]  # fmt: skip
    model = load_pruned(small)
    assert sum(p.numel() for p in model.parameters()) == report["after"]["parameters"]
    assert (tmp_path / "hub" / "README.md").exists()
    assert "macs-budget 0.6" in page.read_text()
    assert json.loads((tmp_path / "small.json").read_text()) == report

    again = tmp_path / "again.safetensors"
    config = [
        "prune", "--config", str(tmp_path / "small.yaml"), "-o", str(again), "--quiet",
        "--macs-budget", "0.5",
    ]  # fmt: skip
    assert main(config) == DONE
    assert capsys.readouterr().err == ""
    written = yaml.safe_load((tmp_path / "again.yaml").read_text())
    assert written["macs_budget"] == 0.5
    assert written["input_size"] == [3, 32, 32]
    fewer = load_pruned(again)
    assert sum(p.numel() for p in fewer.parameters()) < report["after"]["parameters"]

    typed = [
        "evaluate", str(small), "--whole", "resnet10t", "--weights", str(tmp_path / "weights.pth"),
        "--num-classes", "4", "--input-size", "3", "32", "32", "--data", str(pictures), "--json",
    ]  # fmt: skip
    assert main(typed) == DONE
    found = json.loads(capsys.readouterr().out)
    assert found[str(small)]["parameters"] == report["after"]["parameters"]
    assert found["resnet10t"]["parameters"] == report["before"]["parameters"]
    assert all(0 <= found[name]["accuracy"] <= 1 for name in (str(small), "resnet10t"))

    assert main(["report", str(tmp_path / "small.json"), "-o", str(tmp_path / "b.html")]) == DONE
    assert "next: open" in capsys.readouterr().out
    assert (tmp_path / "b.html").exists()


def test_a_model_and_data_of_ones_own(
    folder: Path, own: Own, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [
        "prune", own("model"), "--data", own("data"), "--importance",
        own("Smallest"), "--pruning-ratio", "0.5", "--fold", "false", "--iterative-steps",
        "2", "-o", "small.safetensors",
    ]  # fmt: skip
    assert main(typed) == DONE
    assert "next: " in capsys.readouterr().out
    assert main(
        ["evaluate", "small.safetensors", "--structure", own("model"), "--data",
         own("data"), "--json"]
    ) == DONE  # fmt: skip
    found = json.loads(capsys.readouterr().out)["small.safetensors"]
    assert found["macs"] == 12 * 20 + 20 * 4
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("ending", ["csv", "json", "html", "png"])
def test_sensitivity(
    folder: Path, own: Own, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if ending == "png":
        pytest.importorskip("matplotlib")
    typed = ["sensitivity", own("model"), "--data", own("data")]
    assert main([*typed, "-o", f"table.{ending}", "--json"]) == DONE
    table = json.loads(capsys.readouterr().out)["sensitivity"]
    assert list(table) == ["0"]
    assert list(table["0"].values()) == sorted(table["0"].values())
    assert (folder / f"table.{ending}").stat().st_size > 0
    if ending == "csv":
        rows = (folder / "table.csv").read_text().splitlines()
        assert float(rows[1].split(",")[5]) == table["0"]["0.5"]


def test_profile_then_prune_by_it(
    folder: Path, own: Own, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["profile", own("model"), "--data", own("data"), "-o", "p.safetensors"]
    assert main(typed) == DONE
    assert "Profile of 40 neurons" in capsys.readouterr().out
    typed = [
        "prune", own("model"), "--data", own("data"), "--profile",
        "p.safetensors", "--theta", "0.9", "-o", "small.safetensors",
    ]  # fmt: skip
    assert main(typed) == DONE


def test_check_changes_nothing_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["check", "resnet10t", "--input-size", "3", "32", "32", "-o", "structure.svg"]
    assert main(typed) == DONE
    text = capsys.readouterr().out
    assert "left alone: fc: makes the model's output" in text
    assert (folder / "structure.svg").read_text().startswith("<svg")


def test_export_as_a_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["export", "resnet10t", "--input-size", "3", "32", "32", "-o", "model.pt2"]
    assert main(typed) == DONE
    inputs = torch.randn(1, 3, 32, 32)
    torch.manual_seed(0)
    assert torch.export.load("model.pt2").module()(inputs).shape == (1, 1000)


def test_export_as_onnx(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    typed = ["export", "resnet10t", "--input-size", "3", "32", "32", "-o", "model.onnx"]
    assert main([*typed, "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["difference"] < 1e-4
    assert [path.name for path in folder.glob("*.onnx*")] == ["model.onnx"]


@pytest.mark.parametrize(
    ("typed", "code", "told"),
    [
        (["prune"], USAGE, "no output is given"),
        (["prune", "-o", "a.safetensors"], USAGE, "no model is given"),
        (["prune", "no_such_net", "-o", "a.safetensors"], USAGE, "there is no model"),
        (["prune", "resnet10t", "-o", "no/a.safetensors"], USAGE, "no folder 'no'"),
        (["prune", "resnet10t", "-o", "a.json"], USAGE, "written beside"),
        (["prune", "resnet10t", "--data", "no", "-o", "a"], REFUSED, "there is no folder 'no'"),
        (["prune", "resnet10t", "--weights", "no.pth", "-o", "a"], REFUSED, "no.pth"),
        (["prune", "resnet10t", "--theta", "2", "-o", "a"], USAGE, "theta"),
        (["prune", "resnet10t", "--theta", "x", "-o", "a"], USAGE, "invalid float"),
        (["prune", "--config", "no.yaml"], USAGE, "no.yaml"),
        (["evaluate", "no.safetensors"], REFUSED, "no.safetensors"),
        (["sensitivity", "resnet10t"], USAGE, "pass --data"),
        (["finetune", "resnet10t", "-o", "a"], USAGE, "pass --data"),
        (["finetune", "resnet10t", "--data", "no", "-o", "no/a"], USAGE, "no folder 'no'"),
        (["finetune", "resnet10t", "--amp", "int8", "--data", "no", "-o", "a"], USAGE, "bfloat16"),
        (["finetune", "resnet10t", "--data", "no", "-o", "a"], REFUSED, "there is no folder 'no'"),
        (["export", "resnet10t", "-o", "a.bin"], USAGE, "FILE.onnx"),
        (["report", "no.json"], REFUSED, "no.json"),
        (["dance"], USAGE, "invalid choice"),
    ],
)
def test_what_is_refused(
    folder: Path, typed: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert main(typed) == code
    assert told in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_options_of_the_file_are_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.yaml").write_text("thetta: 1\n")
    assert main(["prune", "--config", "a.yaml"]) == USAGE
    assert "has 'thetta'" in capsys.readouterr().err
    (folder / "a.yaml").write_text("theta: high\n")
    assert main(["prune", "--config", "a.yaml"]) == USAGE
    assert "theta is 'high'" in capsys.readouterr().err


def test_weights_under_other_names_are_taken_in_order_when_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = timm.create_model("resnet10t").state_dict()
    torch.save({f"x.{name}": value for name, value in state.items()}, "w.pth")
    typed = ["check", "resnet10t", "--input-size", "3", "32", "32", "--weights", "w.pth"]
    assert main(typed) == REFUSED
    assert "--weights-by-order" in capsys.readouterr().err
    assert main([*typed, "--weights-by-order"]) == DONE


def test_ctrl_c_leaves_the_files_as_they_were(
    folder: Path, own: Own, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(folder.iterdir())
    monkeypatch.setattr(prune, "pruned", interrupted)
    typed = ["prune", own("model"), "--theta", "0.9", "-o", "small.safetensors"]
    assert main([*typed, "--data", own("data")]) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_every_option_of_the_pruner_can_be_given() -> None:
    arguments = set(inspect.signature(NSSPruner).parameters)
    arguments |= set(inspect.signature(tp.pruner.BasePruner).parameters)
    elsewhere = {"model", "example_inputs", "data", "progress", "positional"}
    elsewhere |= {"torch_pruning_arguments"}
    old_names = {"channel_groups", "ch_sparsity", "ch_sparsity_dict"}
    assert arguments - elsewhere - old_names == {option.name for option in PRUNER_OPTIONS}


def test_a_pruned_file_of_another_model_needs_its_structure(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pruned(nn.Linear(3, 2), "a.safetensors")
    assert main(["evaluate", "a.safetensors"]) == USAGE
    assert "pass model=" in capsys.readouterr().err


def test_as_a_process(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nss_prune.cli", "--help"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    assert "sensitivity" in done.stdout


def test_a_dtype_is_named() -> None:
    option = next(option for option in PRUNER_OPTIONS if option.name == "forward_dtype")
    assert option.resolved(option.kind("bfloat16"), nn.Identity()) is torch.bfloat16
    with pytest.raises(ArgumentError, match="give bfloat16"):
        option.resolved(option.kind("nn"), nn.Identity())
