"""Seconds of calls and stages."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn

from nss_prune.core.timing import CALLS, call_seconds, least_seconds, stage


def test_the_fastest_of_calls_after_a_first_one() -> None:
    waits = iter([0.0, *[0.02] * (CALLS - 1), 0.002])
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(next(waits))

    assert 0.002 <= least_seconds(call) < 0.02
    assert len(calls) == CALLS + 1


def test_the_model_and_random_numbers_are_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert call_seconds(model, torch.randn(4, 3, generator=torch.Generator())) > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_stages_are_logged_and_add_up(caplog: pytest.LogCaptureFixture) -> None:
    seconds: dict[str, float] = {}
    with caplog.at_level(logging.DEBUG, logger="nss_prune"):
        for _ in range(2):
            with stage("measuring", seconds):
                time.sleep(0.01)
    assert 0.02 <= seconds["measuring"] < 1
    assert caplog.messages == ["measuring", "measuring"]
