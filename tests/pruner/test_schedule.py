"""The passes known beforehand, one bar over all of them, and the log."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
from test_upkeep import Counted, made

from networks import assert_unchanged, cnn, fingerprint, mlp
from nss_prune import NSSPruner
from nss_prune.core.batches import labelled_batches
from nss_prune.core.progress import Progress

SETTINGS: dict[str, dict[str, Any]] = {
    "divergence": {"params_budget": 0.6},
    "two kinds of repairs": {"params_budget": 0.6, "recalibrate": True, "balance": True},
    "parts": {"params_budget": 0.6, "memory_limit": 2000},
    "theta": {"theta": 0.9},
    "importance": {"pruning_ratio": 0.5, "importance": lambda group: None, "balance": True},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_passes_that_come_are_those_planned(case: str, caplog) -> None:
    model, data = made(mlp if case == "parts" else cnn)
    settings = dict(SETTINGS[case])
    if case == "importance":
        import torch_pruning as tp

        settings["importance"] = tp.importance.GroupMagnitudeImportance()
    pruner = NSSPruner(model, data[0][0][:2], data=data, **settings)
    before = fingerprint(model)
    planned = pruner.plan()
    assert_unchanged(model, before)
    caplog.set_level(logging.INFO, logger="nss_prune")
    pruner.step()
    passes = sum(stage.passes for stage in planned.stages)
    lines = [record.getMessage() for record in caplog.records if record.name == "nss_prune"]
    assert [line.split(" ")[0] for line in lines] == [
        f"{number}/{passes}" for number in range(1, passes + 1)
    ]
    assert all(re.search(r", \d+ s left$", line) for line in lines[1:])


def test_the_plan_tells_seconds_and_bytes_and_fits_a_screen() -> None:
    model, data = made(cnn)
    pruner = NSSPruner(model, data[0][0][:2], data=data, params_budget=0.6, balance=True)
    planned = pruner.plan()
    assert planned.batches == len(data)
    assert planned.seconds is not None
    assert planned.seconds > len(data) * planned.seconds_per_batch > 0
    # 10 neurons repeat in a map of 160 channels, which are summed channel by channel.
    sums = 12 * (2 * 10**2 + 8**2 + 2 * 14**2) + 12 * (8**2 + 160**2 + 14**2)
    assert 0 < planned.bytes <= sums
    text = str(planned).splitlines()
    assert len(text) == len(planned.stages) + 1
    assert all(len(line) < 80 for line in text)


def test_a_stream_has_no_seconds() -> None:
    model, data = made(mlp)
    planned = NSSPruner(model, data[0][0][:2], data=iter(data), params_budget=0.6).plan()
    assert planned.seconds is None
    assert planned.batches is None
    assert [stage.name for stage in planned.stages] == ["sensitivity"]


def test_a_plan_reads_one_batch() -> None:
    model, data = made(mlp)
    counted = Counted(data)
    NSSPruner(model, data[0][0][:2], data=counted, params_budget=0.6).plan()
    assert counted.read == 1


@pytest.mark.parametrize("came", [["one", "two"], ["two"], ["one", "two", "three"], []])
def test_the_bar_reaches_its_end_whatever_comes(came: list[str]) -> None:
    shares = [0.0]
    with Progress([("one", 3.0), ("two", 1.0)], False).running() as stages:
        for name in came:
            for _ in stages.over([1, 2, 3], name):
                shares.append(stages.share)
    assert stages.share == pytest.approx(1)
    assert shares == sorted(shares) or "three" in came


def test_a_pass_that_ends_early_counts_as_a_whole_one() -> None:
    model, data = made(mlp)
    with Progress([("effects", 3.0), ("two", 1.0)], False).running() as stages:
        batches = labelled_batches(model, data, None, "effects")
        next(batches)
        batches.close()
        assert stages.share == pytest.approx(0.75)
