"""rq1, pilot and speed: their arithmetic on points set by hand, and a small run of each script."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import pilot, rq1, speed
from benchmarks.common import models, results
from benchmarks.published import slicing as targets
from benchmarks.reports import rq1 as rq1_report
from benchmarks.reports.rq1 import Point
from benchmarks.timings import freezing as speed_freezing
from nss_prune.errors import ArgumentError, NSSPruneError
from nss_prune.profiling.contributions.protocol import metrics_known


def points(strategy: str, *pairs: tuple[float, float]) -> list[Point]:
    return [Point(0, "taylor", strategy, i / 10, cr, acc, 0.9) for i, (cr, acc) in enumerate(pairs)]


BY_HAND = [
    *points("semantic", (0.5, 0.9), (1.0, 0.9)),
    *points("category", (0.5, 0.9), (0.8, 0.3)),
    *points("global", (0.8, 0.1)),
]


def test_means_are_areas_over_the_rates_that_all_reach() -> None:
    found = rq1_report.means(BY_HAND)
    assert found["semantic"] == pytest.approx(0.9)
    assert found["category"] == pytest.approx((0.5 * 0.9 + 0.3 * 0.6) / 0.8, abs=1e-3)
    assert found["global"] == pytest.approx(0.5, abs=1e-3)


def test_accuracy_between_measured_rates() -> None:
    assert rq1_report.at_rate(BY_HAND, "category", 0.65) == pytest.approx(0.6)
    assert rq1_report.at_rate(BY_HAND, "global", 0.4) == pytest.approx(0.5)
    assert rq1_report.at_rate(BY_HAND, "global", 0.81) is None


def test_rows_of_rq1() -> None:
    rows = rq1_report.table_rows(BY_HAND, ["taylor"])
    assert [row["strategy"] for row in rows] == ["semantic", "category", "global"]
    assert rows[0]["lead"]["mean"] == pytest.approx(100 * (0.9 - 0.7875), abs=0.2)
    assert rows[2]["loss_50"]["mean"] == pytest.approx(50)
    paper = rq1_report.paper_rows("alexnet-cifar10", BY_HAND)
    assert [row["paper_loss"] for row in paper] == [0.38, 3.0]
    assert paper[0]["loss"]["mean"] == pytest.approx(0)


def test_the_papers_pilot_tables_are_whole() -> None:
    for columns, rows in targets.PILOT.values():
        assert len(rows) == len(pilot.BANDS)
        assert all(len(row) == len(columns) for row in rows)


def test_a_band_is_masked_in_every_layer() -> None:
    class Known:
        groups = ()

    scores = {"a": torch.arange(20.0), "b": torch.tensor([3.0, 1.0, 2.0])}
    kept = {}

    def remember(masks: dict[str, torch.Tensor], groups: object) -> None:
        kept.update(masks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pilot, "Slice", remember)
        pilot.without_band(scores, (0.1, 0.2), Known())
    assert (~kept["a"]).nonzero().flatten().tolist() == [16, 17]
    assert (~kept["b"]).nonzero().flatten().tolist() == [0]


def test_speed_compares_what_gives_the_same_sets() -> None:
    activations = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).double().relu()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    plain = speed.plain_similarities(activations, order)
    entry = speed.ours_thresholds(activations, order)
    speed.check_same_sets(plain, entry, order)
    with pytest.raises(NSSPruneError, match="differ"):
        speed.check_same_sets(plain, entry.flip(0), order)


def test_ratio_row() -> None:
    row = speed.ratio_row("x", [1.0, 2.0], [10.0, 10.0], "", faster=True)
    assert row["ratio"] == "7.50 (5.00 .. 10.00) x faster"
    with pytest.raises(ArgumentError, match="no part"):
        speed.main(["--parts", "everything"])


def test_training_steps_are_timed_with_half_of_the_neurons_frozen(monkeypatch) -> None:
    model = models.mlp(16, 8, 6, 10)
    monkeypatch.setattr(speed_freezing, "CASES", {"small": (lambda: model, (20, 16))})
    trained = []

    def once(*timed_and_repeats):
        moved = []
        for steps in timed_and_repeats[:2]:
            steps()
            weights = steps.args[0].get_parameter("1.weight")
            moved.append(int((weights != model.get_parameter("1.weight")).any(1).sum()))
        trained.append(moved)
        return [1.0], [2.0]

    monkeypatch.setattr(speed_freezing, "in_turn", once)
    rows = speed_freezing.freezing(1)
    assert [row["what"] for row in rows] == [
        "small, critical train, SGD", "small, critical train, AdamW", "small, others train, SGD",
        "small, others train, AdamW", "small, critical train, AdamW, gradients zeroed",
    ]  # fmt: skip
    assert trained == [[4, 8]] * 5  # of eight neurons


def test_deeparcs_star_is_the_model_without_its_redundant_layers(tmp_path: Path, capsys) -> None:
    words = ["--epochs", "3", "--seeds", "1", "--metrics", "taylor", "--threshold", "0.2"]
    rq1.main([*words, "--output", str(tmp_path), "--cache", str(tmp_path)])
    content = results.read(tmp_path / "rq1-mlp-digits.json")
    (row,) = content["layers"]
    (star,) = [
        Point(**point) for point in content["points"] if point["strategy"] == rq1_report.LAYERS
    ]
    # The second hidden layer gives way to a linear map of the same size.
    assert "DeepArc: without 3\n" in capsys.readouterr().out
    assert star.compression_rate == 0
    assert row["CR"]["mean"] == pytest.approx(100 * star.compression_rate)
    assert row["loss"]["mean"] == pytest.approx(100 * (star.dense - star.accuracy))
    assert [row["strategy"] for row in content["rows"]] == list(rq1_report.STRATEGIES)


@pytest.mark.parametrize("script", [rq1, pilot])
def test_scripts_end_to_end(script, tmp_path: Path, capsys) -> None:
    words = ["--epochs", "3", "--seeds", "1", "--output", str(tmp_path), "--cache", str(tmp_path)]
    script.main(words)
    name = script.__name__.rpartition(".")[2]
    content = results.read(tmp_path / f"{name}-mlp-digits.json")
    assert content["rows"]
    printed = capsys.readouterr().out
    assert all(metric in printed for metric in metrics_known())
