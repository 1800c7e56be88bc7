"""rq3: Table 5, its arithmetic on outcomes set by hand, and a small run of the script."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import rq3
from benchmarks.common import results, tables
from benchmarks.common.data import Data, load
from benchmarks.common.settings import SETTINGS
from benchmarks.common.training import initialised, trained
from benchmarks.learners import readapted
from benchmarks.learners.readapted import Course, Subject
from benchmarks.published import adaptation as targets
from benchmarks.reports.rq3 import Outcome
from nss_prune import Profile, profile
from nss_prune.adaptation import FGSM, PGD
from nss_prune.errors import ArgumentError

FULL = Outcome("mlp-mnist", 0, "fgsm", "full", 1.0, 0.98, 0.20, 0.95, seconds=4.0)
SLICED = Outcome("mlp-mnist", 0, "fgsm", "neusemslice", 0.6, 0.99, 0.25, 0.96, seconds=3.0)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return load("digits", cache=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def subject(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """mlp-digits, trained for a moment; so are the new samples."""
    setting = SETTINGS["mlp-digits"].with_epochs(3)
    cache = tmp_path_factory.mktemp("models")
    model = trained("m", setting.build, digits, setting.recipe, 0, cache).model
    return Subject(setting.name, 0, model, digits, Course(setting.recipe), 20)


def test_table_5_is_whole_and_has_the_means_of_the_papers_text() -> None:
    papers = set(rq3.METHODS) - {"sensitive"}
    assert len(targets.TABLE_5) == len(rq3.ATTACKS) * len(papers) * len(targets.SETTINGS)
    assert papers == {method for _, _, method in targets.TABLE_5}
    for method, mean in targets.MEAN_TPR.items():
        shares = [cell.tpr for (_, _, found), cell in targets.TABLE_5.items() if found == method]
        assert statistics.fmean(shares) == pytest.approx(mean, abs=0.005)
    for method, gain in targets.RA_GAIN.items():
        gains = [
            cell.ra - targets.TABLE_5[setting, attack, "full"].ra
            for (setting, attack, found), cell in targets.TABLE_5.items()
            if found == method
        ]
        assert statistics.fmean(gains) == pytest.approx(gain, abs=0.035)


def test_theta_is_the_largest_that_keeps_the_share(subject: Subject) -> None:
    known: Profile = profile(subject.model, subject.batches)
    shares = {t: 1 - known.slice(t).compression_rate(subject.model) for t in readapted.THETAS}
    for share in (0.3, 0.6, 0.9):
        theta, critical = readapted.largest_slice(known, subject.model, share)
        assert 1 - critical.compression_rate(subject.model) == shares[theta] <= share
        assert all(shares[larger] > share for larger in readapted.THETAS if larger > theta)
    assert readapted.largest_slice(known, subject.model, 1e-9)[0] == min(readapted.THETAS)


def test_samples_are_gathered_evenly_and_the_same_every_time(digits: Data) -> None:
    few = readapted.gathered(digits.train, 50)
    assert few.labels.bincount().tolist() == [5] * 10
    assert torch.equal(few.pixels, readapted.gathered(digits.train, 50).pixels)
    assert len(readapted.gathered(digits.check)) == len(digits.check) < readapted.SAMPLES
    batches = readapted.new_samples(digits, SETTINGS["mlp-digits"].recipe)
    assert len(batches[0][1]) == SETTINGS["mlp-digits"].recipe.batch // 2


@pytest.mark.parametrize(
    ("name", "epsilon", "step_size", "steps"),
    [("digits", 0.3, 0.01, 40), ("cifar10", 8 / 255, 2 / 255, 10)],
)
def test_attacks_have_the_usual_strength(
    name: str, epsilon: float, step_size: float, steps: int, digits: Data
) -> None:
    data = replace(digits, name=name)
    fgsm, pgd = (readapted.attack_of(attack, data) for attack in rq3.ATTACKS)
    assert isinstance(fgsm, FGSM)
    assert fgsm.epsilon == epsilon
    assert isinstance(pgd, PGD)
    assert (pgd.epsilon, pgd.step_size, pgd.steps) == (epsilon, step_size, steps)


@pytest.mark.parametrize("name", list(rq3.ATTACKS))
def test_adversaries_stay_within_epsilon_and_the_range_of_a_pixel(
    name: str, subject: Subject
) -> None:
    (inputs, labels), *_ = readapted.new_samples(subject.data, subject.course.recipe)
    moved = readapted.attack_of(name, subject.data)(subject.model, inputs, labels)
    split = subject.data.train
    before, after = ((x * split.std + split.mean) / 16 for x in (inputs, moved))
    assert (after - before).abs().max() == pytest.approx(0.3, abs=1e-5)
    assert after.min() >= -1e-6
    assert after.max() <= 1 + 1e-6


@pytest.mark.parametrize("method", [rq3.BEFORE, *rq3.METHODS])
def test_a_method_leaves_the_model_as_it_was(method: str, subject: Subject) -> None:
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    random = torch.get_rng_state()
    outcome = rq3.run_method(subject, "fgsm", method)
    assert all(torch.equal(before[n], v) for n, v in subject.model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert (outcome.seconds > 0) == (method != rq3.BEFORE)
    assert (outcome.theta is not None) == ("neusemslice" in method)


def test_methods_train_what_is_theirs(subject: Subject) -> None:
    alike = replace(subject, course=replace(subject.course, similar=0.01))
    layers, _ = alike.layers
    assert layers.redundant
    assert alike.trained_by("full") == "all"
    assert alike.trained_by("sensitive") == alike.course.tpr
    shares = [alike.trained_by(method).share for method in list(rq3.METHODS)[1:4]]
    critical = alike.sliced.critical
    assert shares[0] == layers.share < 1
    assert shares[1] == pytest.approx(1 - critical.compression_rate(alike.model))
    assert shares[2] < min(shares[:2])


def test_new_samples_are_learned(subject: Subject) -> None:
    course = replace(subject.course, recipe=replace(subject.course.recipe, epochs=20))
    longer = replace(subject, course=course)
    before, after = (rq3.run_method(longer, "fgsm", m) for m in (rq3.BEFORE, "neusemslice"))
    assert before.ra < 0.4
    assert after.ra > 0.9
    assert 0 < after.tpr <= 0.6


def test_a_seed_gives_the_same_outcome(subject: Subject) -> None:
    first, second = (replace(rq3.run_method(subject, "pgd", "full"), seconds=0.0) for _ in range(2))
    assert first == second


def test_time_is_relative_to_full_training() -> None:
    times = [outcome.time for outcome in rq3.timed([FULL, SLICED])]
    assert times == [1.0, 0.75]
    assert rq3.timed([SLICED]) == [SLICED]


def test_of_repeated_trainings_the_median_of_the_ratios_counts() -> None:
    seconds = [(4.0, 3.0), (8.0, 8.8), (2.0, 1.6)]
    rounds = [
        rq3.timed([replace(FULL, seconds=full), replace(SLICED, seconds=sliced)])
        for full, sliced in seconds
    ]
    full, sliced = map(rq3.median_time, zip(*rounds, strict=True))
    assert (full.seconds, full.time) == (4.0, 1.0)
    assert (sliced.seconds, sliced.time) == (3.0, 0.8)
    assert sliced.ratios == (0.75, 1.1, 0.8)
    assert replace(sliced, seconds=SLICED.seconds, time=SLICED.time, ratios=()) == SLICED


def test_pairs_of_all_models_have_a_median_and_quartiles() -> None:
    models = [replace(SLICED, ratios=(0.8, 0.9)), replace(SLICED, seed=1, ratios=(1.0, 1.2, 0.7))]
    (row,) = rq3.table_rows(models)
    assert row["paired"] == "90.0 (80.0 to 100.0)"
    assert rq3.table_rows(models[:1])[0]["paired"] is None


def test_methods_train_in_turn(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []

    def run_method(subject: Subject, name: str, method: str) -> Outcome:
        trained.append(method)
        return replace(FULL, method=method)

    monkeypatch.setattr(rq3, "run_method", run_method)
    found = rq3.run_model(subject, ["fgsm"], ["full", "neusemslice"], repeats=2)
    assert trained == [rq3.BEFORE, *["full", "neusemslice"] * 2]
    assert [outcome.method for outcome in found] == [rq3.BEFORE, "full", "neusemslice"]
    assert found[0].time is None


def test_rows_hold_the_papers_cells_beside_ours() -> None:
    rows = rq3.table_rows(rq3.timed([FULL, SLICED]))
    assert [row["method"] for row in rows] == ["FGSM: full training", "FGSM: NeuSemSlice"]
    found = rows[1]
    assert found["TPR"] == tables.spread([60.0])
    assert found["time"] == tables.spread([75.0])
    assert [found[f"paper_{key}"] for key in ("TPR", "RA", "RAA")] == [26.74, 100.0, 18.1]


def test_rows_over_settings_are_means_of_their_means() -> None:
    other = replace(SLICED, setting="mlp-fmnist", tpr=0.2, raa=0.05)
    (found,) = rq3.table_rows([SLICED, replace(SLICED, seed=1, tpr=0.4), other])
    assert found["TPR"] == pytest.approx((50 + 20) / 2)
    assert found["RAA"] == pytest.approx((25 + 5) / 2)
    assert found["paper_TPR"] == pytest.approx((26.74 + 49.26) / 2)
    assert found.get("time") is None


def held(*outcomes: Outcome) -> dict[str, str]:
    rows = rq3.summary(rq3.timed(outcomes))
    return {str(row["claim"]).split(":")[0].split(",")[0]: str(row["held"]) for row in rows}


def test_summary_says_what_is_held() -> None:
    assert held(FULL, SLICED) == {"TPR %": "yes", "RA %": "yes", "RAA %": "yes", "time %": "yes"}
    assert held(FULL, replace(SLICED, ra=0.984, raa=0.19, tpr=0.62, seconds=4.1)) == {
        "TPR %": "no", "RA %": "no", "RAA %": "no", "time %": "no"
    }  # fmt: skip
    assert held(replace(FULL, ra=1.0), replace(SLICED, ra=0.995))["RA %"] == "yes"
    assert held(SLICED) == {"TPR %": "yes"}
    assert held(FULL) == {}


def test_precision_is_that_of_the_other_trainings() -> None:
    assert rq3.precision(initialised(SETTINGS["mlp-digits"].build, 0)) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "half"], "no method 'half'; there are: full, deeparc"),
        (["--attacks", "fgsm,cw"], "no attack 'cw'; there are: fgsm, pgd"),
        (["--tpr", "0"], "--tpr is 0.0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--settings", "none"], "no setting 'none'"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        rq3.main(words)


def test_script_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--output", str(tmp_path / "results"), "--cache", str(tmp_path)]
    quick = ["--epochs", "3", "--seeds", "1", "--readapt-epochs", "2", "--evaluated", "5"]
    rq3.main([*quick, "--attacks", "fgsm", *folders])
    content = results.read(tmp_path / "results" / "rq3-mlp-digits.json")
    assert len(content["rows"]) == 1 + len(rq3.METHODS)
    assert content["options"]["new_samples"] == content["options"]["attacked_samples"] == 50
    assert [row["held"] for row in content["summary"]]
    assert [Outcome(**fields).method for fields in content["outcomes"]][1:] == list(rq3.METHODS)
    assert (tmp_path / "results" / "rq3-mlp-digits.png").exists()
    assert "FGSM: NeuSemSlice + DeepArc" in capsys.readouterr().out

    rq3.main([*quick, "--attacks", "fgsm", *folders, "--resume"])
    again = results.read(tmp_path / "results" / "rq3-mlp-digits.json")
    assert again["outcomes"] == content["outcomes"]  # their seconds too


def test_settings_run_one_by_one_are_summed_up(tmp_path: Path) -> None:
    rq3.report_all("fixed", device="cpu", output=tmp_path)
    for setting in ("mlp-mnist", "mlp-fmnist"):
        same = [replace(outcome, setting=setting) for outcome in rq3.timed([FULL, SLICED])]
        results.write(
            tmp_path / f"rq3-{setting}.json", setting, rq3.COLUMNS, [], seeds=[0],
            outcomes=[vars(outcome) for outcome in same],
        )  # fmt: skip
        rq3.report_all("fixed", device="cpu", output=tmp_path)
        assert (tmp_path / "rq3.json").exists() == (setting == "mlp-fmnist")
    content = results.read(tmp_path / "rq3.json")
    assert content["rows"][1]["TPR"] == pytest.approx(60.0)
    assert all(row["held"] == "yes" for row in content["summary"])
