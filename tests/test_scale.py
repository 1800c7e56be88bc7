"""The benchmark of scale: its slopes, and the cases of each axis."""

from __future__ import annotations

import pytest

from benchmarks.scale import Case, cases, check_extrapolation, extrapolated, slope, slopes
from nss_prune.errors import ArgumentError

FIRST = Case("vit_tiny_patch16_224", 8, 2, 1, 1, 32)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0, -0.5])
def test_a_power_law_has_its_power_as_slope(power: float) -> None:
    assert slope([(x, 3 * x**power) for x in (1, 4, 10, 300)]) == pytest.approx(power)
    assert slope([(4, 1), (4, 2)]) is None


def test_one_axis_at_a_time() -> None:
    values = {"samples": [8, 16], "model": ["vit_tiny_patch16_224"], "processes": [1, 2]}
    found = [(axis, case.samples, case.processes) for axis, case in cases(FIRST, values)]
    assert found == [
        ("samples", 8, 1),
        ("samples", 16, 1),
        ("processes", 8, 1),
        ("processes", 8, 2),
    ]
    alone = {axis: along[:1] for axis, along in values.items()}
    assert list(cases(FIRST, alone)) == [("model", FIRST)]


def test_shards_share_all_samples() -> None:
    case = Case("vit_tiny_patch16_224", 40, 2, 2, 1, 32)
    assert sum(len(labels) for rank in range(2) for _, labels in case.data(rank)) == 40
    assert len(case.made().blocks) == 1


def test_slopes_are_by_axis_and_side() -> None:
    rows = [
        {"axis": "samples", "side": side, "samples": n, "seconds": n**power, "megabytes": 5.0}
        for side, power in (("bare", 1), ("ours", 2))
        for n in (2, 4, 8)
    ]
    assert [(row["side"], round(row["seconds"], 9)) for row in slopes(rows)] == [
        ("bare", 1.0), ("ours", 2.0),
    ]  # fmt: skip


def test_more_samples_are_on_the_line_through_those_measured() -> None:
    rows = [
        {"axis": "samples", "side": side, "samples": n, "seconds": fixed + each * n, "megabytes": 5}
        for side, fixed, each in (("bare", 0.0, 2.0), ("ours", 100.0, 8.0))
        for n in (104, 128, 160)
    ]
    bare, ours = extrapolated(rows, 256)
    assert bare["seconds"] == pytest.approx(512)
    assert ours["seconds"] == pytest.approx(2148)
    assert ours["times"] == pytest.approx(2148 / 512)
    assert ours["kind"] == "extrapolated"
    assert ours["megabytes"] is None
    check_extrapolation([8], None)
    for samples in ([128], [8, 128], [128, 128]):
        with pytest.raises(ArgumentError, match="two or more"):
            check_extrapolation(samples, 256)
