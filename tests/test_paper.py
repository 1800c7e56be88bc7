"""paper.py: what is missing, in which order it is run, what it costs, and the table at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import paper
from benchmarks.common import results
from benchmarks.common.data import load
from benchmarks.common.settings import SETTINGS
from benchmarks.published import adaptation
from benchmarks.replication import costs, recipes
from benchmarks.replication.comparison import COLUMNS, comparison
from benchmarks.replication.costs import Ledger, Measured, Subject, sample_seconds
from benchmarks.replication.pieces import QUESTIONS, Piece, missing, pieces
from benchmarks.replication.plan import Estimate, next_step, planned
from benchmarks.timings import readaptation
from nss_prune.errors import ArgumentError


def written(folder: Path, name: str, **content: object) -> None:
    results.write(folder / f"{name}.json", name, COLUMNS, [], seeds=[0], **content)


def outcome(method: str, **shares: object) -> dict[str, object]:
    return {"method": method, **shares}


def test_a_committed_file_is_done_and_others_by_what_they_hold(tmp_path: Path) -> None:
    committed, output = tmp_path / "committed", tmp_path / "output"
    everything = set(pieces("mlp-mnist"))
    assert set(missing(["mlp-mnist"], output, committed)) == everything
    written(committed, "rq1-mlp-mnist")
    written(output, "rq3-mlp-mnist", outcomes=[])
    written(output, "rq4-mlp-mnist", outcomes=[outcome("retrain")])
    assert everything - set(missing(["mlp-mnist"], output, committed)) == {
        Piece("rq1", "mlp-mnist"), Piece("rq3", "mlp-mnist"), Piece("rq4", "mlp-mnist", "retrain"),
    }  # fmt: skip
    anew = missing(["mlp-mnist"], output, committed, resume=False)
    assert everything - set(anew) == {Piece("rq1", "mlp-mnist")}


def test_what_fills_most_numbers_a_second_comes_first_within_the_time() -> None:
    slow = Estimate(Piece("rq2", "a", numbers=8), seconds=100.0, training=50.0)
    quick = Estimate(Piece("rq1", "a", numbers=1), seconds=10.0, training=50.0)
    other = Estimate(Piece("rq4", "b", "retrain", numbers=1), seconds=1.0, training=500.0)
    # 8 in 150 s are more than 1 in 60; then the model is there, and rq1 takes 10 s alone.
    steps, left = planned([quick, other, slow], (), 170.0)
    assert [(s.estimate, s.seconds, s.only_training) for s in steps] == [
        (slow, 150.0, False), (quick, 10.0, False),
    ]  # fmt: skip
    assert left == [other]
    # Nothing fits into 55 s but the training of a model.
    step = next_step([quick, other, slow], (), 55.0)
    assert step is not None
    assert step.only_training
    assert step.estimate.piece.setting == "a"
    assert next_step([quick, slow, other], (), 49.0) is None
    assert next_step([quick, slow], ("a",), 49.0).estimate == quick  # type: ignore[union-attr]


def test_estimates_follow_what_pieces_took(tmp_path: Path) -> None:
    path = tmp_path / "seconds.json"
    ledger = Ledger(path)
    assert ledger.factor("rq1", "cpu") == 1.0
    for name, seconds in (("rq1 a", 20.0), ("rq1 b", 30.0), ("rq1 c", 90.0), ("rq1 a", 10.0)):
        ledger.add(Measured(name, "cpu", seconds, 10.0))
    again = Ledger(path)
    assert again.factor("rq1", "cpu") == 3.0  # of 1, 3 and 9
    assert again.factor("rq1", "cuda") == again.factor("rq2", "cpu") == 1.0


def test_larger_batches_on_a_gpu_alone_and_the_same_epochs() -> None:
    setting = SETTINGS["vgg16-cifar10"]
    on_cpu, on_gpu = (recipes.scheduled(setting, device, None).recipe for device in ("cpu", "cuda"))
    assert on_cpu.epochs == on_gpu.epochs
    assert (on_cpu.batch, on_cpu.learning_rate) == (128, 0.1)
    assert (on_gpu.batch, on_gpu.learning_rate) == (512, 0.2)
    mlp = SETTINGS["mlp-mnist"]
    assert recipes.scheduled(mlp, "cuda", None) == mlp
    assert mlp.with_batch(512).recipe.learning_rate == mlp.recipe.learning_rate  # Adam's
    with pytest.raises(ArgumentError, match="--batch is 0"):
        mlp.with_batch(0)


def test_work_is_counted_in_samples_trained(tmp_path: Path) -> None:
    setting = SETTINGS["mlp-digits"].with_epochs(3)
    data = load("digits", cache=tmp_path)
    seconds = sample_seconds(setting, data)
    assert 0 < seconds < 1
    subject = Subject(setting, data, 2.0)
    whole, half = Piece("rq1", "mlp-digits"), Piece("rq4", "mlp-digits", "replay-100")
    assert subject.training(whole) == 2.0 * 3 * len(data.train)
    first = sum(int(label) < 5 for label in data.train.labels)
    assert subject.training(half) == 2.0 * 3 * first
    assert not subject.is_trained(whole, tmp_path, 0)
    replayed = subject.work(half) - subject.work(Piece("rq4", "mlp-digits", "retrain"))
    assert replayed == pytest.approx(3 * len(data.train) / 2)
    assert set(costs.WORK) == set(QUESTIONS)
    assert all(subject.work(Piece(question, "mlp-digits")) > 0 for question in QUESTIONS)


def test_the_table_says_who_is_ahead(tmp_path: Path) -> None:
    recipe = {"recipe": {"epochs": 4}}
    loss = {"mean": 3.0, "std": 0.0, "values": [3.0]}
    points = [{"metric": "taylor", "CR": 70.0, "paper_loss": 4.0, "loss": loss}]
    written(tmp_path, "rq1-mlp-mnist", options=recipe, paper=points)
    cells = [("fgsm", 0.8), ("pgd", 0.6)]
    written(tmp_path, "rq3-mlp-mnist", options=recipe, outcomes=[
        {"method": "neusemslice", "attack": attack, "tpr": share, "ra": 1.0, "raa": 0.155}
        for attack, share in cells
    ])  # fmt: skip
    written(tmp_path, "rq4-mlp-mnist", options=recipe,
            outcomes=[{"method": "neusemslice", "final": [0.9, 0.8]}])  # fmt: skip
    rows = comparison(["mlp-mnist"], [tmp_path / "none", tmp_path])
    found = {(row["table"], row["quantity"]): (row["ours"], row["ahead"]) for row in rows}
    assert found["Figure 5", "loss at CR 70 %, taylor, points"] == (3.0, "ours")
    assert found["Figure 5", "loss at CR 70 %, deeplift, points"] == (None, "not measured")
    # 70 % of the parameters train, where the paper has 26.74 %: fewer are better.
    assert found["Table 5", "NeuSemSlice, both attacks: TPR %"] == (pytest.approx(70.0), "paper")
    assert found["Table 5", "NeuSemSlice, both attacks: RA %"] == (100.0, "equal")
    paper_raa = next(row["paper"] for row in rows if str(row["quantity"]).endswith("RAA %"))
    assert paper_raa == pytest.approx((18.1 + 12.9) / 2)
    assert found["Table 5", "NeuSemSlice, both attacks: RAA %"][1] == "equal"  # 15.50
    assert found["Table 6", "NeuSemSlice: average %"] == (pytest.approx(85.0), "paper")
    unmeasured = [row for row in rows if row["table"] == "Table 4"]
    assert len(unmeasured) == 3
    assert {row["ahead"] for row in unmeasured} == {"not measured"}


def test_table_4_is_compared_over_the_methods_that_ran() -> None:
    rows = comparison(["mlp-mnist", "alexnet-cifar10"], [results.FOLDER])
    content = results.read(results.FOLDER / "rq2-mlp-mnist.json")
    by_method = {row["method"]: row for row in content["rows"]}
    ours = [by_method[f"NeuSemSlice + {x}"]["CR"]["mean"] for x in
            ("LAMP", "Global", "Uniform+", "ERK")]  # fmt: skip
    (row,) = [
        row for row in rows
        if (row["table"], row["setting"]) == ("Table 4", "mlp-mnist") and "CR %" in row["quantity"]
    ]  # fmt: skip
    assert row["ours"] == pytest.approx(sum(ours) / 4)
    assert row["paper"] == pytest.approx((53.05 + 3 * 42.04) / 4)


def run(tmp_path: Path, *words: str) -> None:
    paper.main([
        "--settings", "mlp-digits", "--epochs", "1", "--evaluated", "4",
        "--output", str(tmp_path / "output"), "--cache", str(tmp_path / "cache"),
        "--committed", str(tmp_path / "committed"), *words,
    ])  # fmt: skip


def test_a_plan_runs_nothing(tmp_path: Path, capsys) -> None:
    run(tmp_path, "--plan")
    printed = capsys.readouterr().out
    assert all(piece.name in printed for piece in pieces("mlp-digits"))
    assert not (tmp_path / "output").exists()
    assert not (tmp_path / "cache" / "models").exists()


def test_short_runs_add_up(tmp_path: Path, monkeypatch, capsys) -> None:
    committed = [p for p in pieces("mlp-digits") if p.question in ("rq1", "rq2", "rq3")]
    for piece in committed:
        recipe = {"recipe": {"epochs": 1}}
        written(tmp_path / "committed", piece.path(Path()).stem, options=recipe, outcomes=[],
                paper=[])  # fmt: skip

    def methods() -> list[str]:
        content = json.loads((tmp_path / "output" / "rq4-mlp-digits.json").read_text("utf-8"))
        return [one["method"] for one in content["outcomes"]]

    learners = "benchmarks.replication.pieces.LEARNERS"
    monkeypatch.setattr(learners, ("original",))
    run(tmp_path)
    assert methods() == ["original"]
    monkeypatch.setattr(learners, ("original", "retrain"))
    run(tmp_path, "--plan", "--resume")
    planned_rows = capsys.readouterr().out.partition("Piece")[2]
    assert "rq4 mlp-digits retrain" in planned_rows
    assert "rq4 mlp-digits original" not in planned_rows
    run(tmp_path, "--resume")
    assert methods() == ["original", "retrain"]
    assert results.read(tmp_path / "output" / "paper.json")["missing"] == []
    assert "0 pieces are missing" in capsys.readouterr().out
    assert len(Ledger(tmp_path / "output" / "paper-seconds.json").entries) == 2


def test_refuses_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="--minutes is 0"):
        run(tmp_path, "--minutes", "0")
    with pytest.raises(ArgumentError, match="There is no question 'rq5'"):
        run(tmp_path, "--questions", "rq5")
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="cannot be used here"):
            run(tmp_path, "--device", "cuda")


def test_a_setting_without_data_is_left_out(tmp_path: Path, capsys) -> None:
    run(tmp_path, "--plan", "--settings", "vgg19-imagenet10", "--data", str(tmp_path))
    printed = capsys.readouterr().out
    assert "vgg19-imagenet10 is left out: There is no" in printed
    assert tuple(paper.parser().parse_args([]).settings.split(",")) == adaptation.SETTINGS


def test_a_step_of_readaptation_is_timed_against_one_of_the_whole_model(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(readaptation, "CASES", ("mlp-digits",))
    monkeypatch.setattr(readaptation, "UNTRAINED", ("mlp-digits",))
    (row,) = readaptation.readaptation(1, None, tmp_path)
    assert str(row["what"]).startswith("mlp-digits, ")
    assert row["ours"] > 0
    assert row["other"] > 0
