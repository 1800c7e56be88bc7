"""Models are timed in turns, and the figures are those of the calls."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nss_prune.cli.main import DONE, main
from nss_prune.core.timing import LEAST_ROUNDS, Timing, alternating

Own = Callable[[str], str]


def test_calls_take_turns_and_each_is_first_in_its_turn() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    found = alternating(calls, rounds=6)
    assert "".join(called) == "aabbcc" + "abcbcacab" * 2
    assert all(timing.rounds == 6 for timing in found.values())


def test_the_slower_call_takes_longer_and_patience_ends_the_rounds() -> None:
    calls = {"slow": lambda: time.sleep(0.01), "fast": lambda: time.sleep(0.001)}
    found = alternating(calls, rounds=1000, patience=0.0)
    assert found["slow"].rounds == LEAST_ROUNDS
    assert found["slow"].median >= 0.01
    assert found["fast"].median < found["slow"].median


def test_quartiles_of_a_row_of_numbers() -> None:
    found = Timing.of([0.005, 0.001, 0.003, 0.002, 0.004])
    assert (found.low, found.median, found.high, found.rounds) == (0.002, 0.003, 0.004, 5)
    assert found.text == "3 (2-4)"


def test_two_models_in_onnx_runtime(
    folder: Path, own: Own, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    typed = ["prune", own("model"), "--data", own("data"), "--params-budget", "0.5"]
    assert main([*typed, "-o", "small.safetensors", "--quiet"]) == DONE
    typed = [
        "evaluate", "small.safetensors", "--structure", own("model"), "--whole", own("model"),
        "--data", own("data"), "--json",
    ]  # fmt: skip
    capsys.readouterr()
    found = {}
    for runtime in ("torch", "onnxruntime"):
        assert main([*typed, "--runtime", runtime]) == DONE
        found[runtime] = json.loads(capsys.readouterr().out)
    for name in ("small.safetensors", own("model")):
        torch_, onnx = found["torch"][name], found["onnxruntime"][name]
        assert onnx["accuracy"] == torch_["accuracy"]
        assert onnx["seconds"]["low"] <= onnx["seconds"]["median"] <= onnx["seconds"]["high"]
        assert onnx["macs"] == torch_["macs"]
