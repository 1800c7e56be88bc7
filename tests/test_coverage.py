"""coverage: which models are chosen, what the outcome of a process is, and what they sum up to."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from benchmarks.architectures import cli, models, outcomes, sides, state, trial
from benchmarks.architectures.models import Model
from benchmarks.architectures.outcomes import OURS, STAGES, THEIRS, Outcome
from benchmarks.architectures.state import State
from benchmarks.common import results
from nss_prune.errors import ArgumentError

RESNET = Model("timm", "test_resnet")
needs_toys = pytest.mark.skipif(
    not timm.is_model(RESNET.name), reason=f"this timm has no {RESNET.name}"
)


OPTIONS = {"samples": 128, "pixels": None}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def through(model: str, side: str) -> Outcome:
    return Outcome(model, side, ok=True, stage="export", parameters_before=100, parameters_after=70)


def fallen(model: str, side: str, stage: str, cause: str = "", **more) -> Outcome:
    return Outcome(model, side, stage=stage, cause=cause, **more)


# Which models


def made_up(name: str) -> nn.Module:
    """A model of the width that its name ends with, unless it is "broken"."""
    if name == "broken":
        raise RuntimeError
    return nn.Linear(int(name.rpartition("_")[2]), 1)


def test_the_smallest_of_every_family(monkeypatch) -> None:
    names = {"a": ["a_30", "broken", "a_20", "a_100"], "b": ["broken"], "c": ["d_7", "c_7"]}
    monkeypatch.setattr(timm, "list_modules", lambda: list(names))
    monkeypatch.setattr(timm, "list_models", lambda module, exclude_filters: names[module])
    monkeypatch.setattr(timm, "create_model", made_up)
    chosen = models.choose("timm", {})
    assert chosen == {
        "version": timm.__version__,
        "models": {"a": "a_20", "b": None, "c": "c_7"},
    }


def test_a_choice_is_made_again_for_another_version_only(monkeypatch) -> None:
    monkeypatch.setattr(models, "families", lambda source: {"a": ["a_30", "a_20"]})
    monkeypatch.setattr(timm, "create_model", made_up)
    kept = {"version": timm.__version__, "models": {"a": "a_30"}}
    assert models.choose("timm", kept) == kept
    assert models.choose("timm", {**kept, "version": "0.1"})["models"] == {"a": "a_20"}


def test_a_choice_is_made_for_families_that_lack_one(monkeypatch) -> None:
    monkeypatch.setattr(models, "families", lambda source: {"a": ["a_3"], "b": ["b_4", "b_2"]})
    monkeypatch.setattr(timm, "create_model", made_up)
    kept = {"version": timm.__version__, "models": {"a": "a_7", "b": None, "gone": "gone_1"}}
    assert models.choose("timm", kept)["models"] == {"a": "a_7", "b": "b_2"}


def test_a_model_that_needs_values_to_be_made_is_made_with_them(monkeypatch) -> None:
    def made(name: str) -> nn.Module:
        layer = nn.Linear(3, 1)
        float(layer.weight.sum())  # fails without values
        return layer

    monkeypatch.setattr(timm, "create_model", made)
    assert models.size_of(models.Model("timm", "any")) == 4


def test_torchvisions_architectures() -> None:
    found = models.families("torchvision")
    names = [name for members in found.values() for name in members]
    assert sorted(names) == sorted(torchvision.models.list_models(module=torchvision.models))
    assert found["wide_resnet"] == ["wide_resnet101_2", "wide_resnet50_2"]
    assert found["swin_v2"] == ["swin_v2_b", "swin_v2_s", "swin_v2_t"]
    assert found["vit"] == ["vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"]
    assert {"regnet_x", "regnet_y", "vgg", "resnet", "resnext", "efficientnet_v2"} < set(found)
    for members in found.values():
        modules = {torchvision.models.get_model_builder(name).__module__ for name in members}
        assert len(modules) == 1


@needs_toys
def test_names() -> None:
    assert models.model_named("resnet18") == Model("timm", "resnet18")
    assert models.model_named("torchvision:resnet18") == Model("torchvision", "resnet18")
    assert models.model_named("vit_b_16").source == "torchvision"
    assert RESNET.family == "resnet"
    for word in ("resnet", "timm:vit_b_16", "elsewhere:resnet18"):
        with pytest.raises(ArgumentError, match="no model"):
            models.model_named(word)


# One model on one side


def test_outcome_that_a_process_prints() -> None:
    outcome = through(str(RESNET), OURS)
    code = f"print('loading'); print({json.dumps(asdict(outcome))!r})"
    assert state.outcome_of(python(code), RESNET, OURS, 60) == outcome


def test_process_that_hangs() -> None:
    code = (
        "import sys, time; print('stage: create\\nstage: build', file=sys.stderr, flush=True); "
        "time.sleep(60)"
    )
    outcome = state.outcome_of(python(code), RESNET, THEIRS, 1)
    assert (outcome.status, outcome.stage, outcome.seconds) == ("hang", "build", 1)
    assert str(outcome) == "hang (1 s)"


@pytest.mark.parametrize("end", ["os._exit(9)", "os.abort()", "sys.exit(1)"])
def test_process_that_dies(end: str) -> None:
    code = f"import os, sys; print('stage: prune', file=sys.stderr, flush=True); {end}"
    outcome = state.outcome_of(python(code), RESNET, THEIRS, 60)
    assert (outcome.status, outcome.stage) == ("failed", "prune")
    assert outcome.cause.startswith("exit code")


def test_what_fails_before_pruning_too_is_noted(monkeypatch) -> None:
    def never(network: nn.Module, inputs: torch.Tensor) -> None:
        raise RuntimeError("no")

    def pruned_only(network: nn.Module, inputs: torch.Tensor) -> None:
        if isinstance(network, nn.ReLU):
            raise RuntimeError("no")

    monkeypatch.setattr(Model, "create", lambda model: nn.Identity())
    tried = trial.Trial(THEIRS, RESNET, 60)
    tried.begin("export")
    tried.check(never, nn.ReLU(), torch.ones(1))
    assert tried.outcome.notes == ["export: not even before"]
    with pytest.raises(RuntimeError, match="no"):
        tried.check(pruned_only, nn.ReLU(), torch.ones(1))


def test_a_refusal_records_whether_the_model_is_intact(monkeypatch) -> None:
    def changes(network: nn.Module, *arguments, **options) -> None:
        network.weight.data[0] = 7
        raise ArgumentError("no")

    def refuses(*arguments, **options) -> None:
        raise ArgumentError("no")

    for pruner, intact in ((refuses, True), (changes, False)):
        monkeypatch.setattr(sides, "NSSPruner", pruner)
        tried = trial.Trial(OURS, RESNET, 60)
        with pytest.raises(ArgumentError):
            sides.prune_ours(tried, nn.Conv2d(3, 2, 1), torch.ones(2, 3, 8, 8))
        assert tried.outcome.refused
        assert tried.outcome.intact is intact
        assert tried.outcome.stage == "build"


def test_bits_see_every_change_but_not_nan() -> None:
    network = nn.BatchNorm1d(2)
    network.weight.data[0] = torch.nan
    before = sides.bits(network)
    assert sides.bits(network) == before
    for change in (network.eval, lambda: network.running_mean.add_(1)):
        change()
        assert sides.bits(network) != before


def test_gradients_must_be_finite() -> None:
    network = nn.Linear(2, 1)
    trial.training_step(network, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="gradient of weight is not finite"):
        trial.training_step(network, torch.full((2, 2), torch.inf))


@needs_toys
def test_one_real_model_end_to_end(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cli.main(["--models", str(RESNET), "--theta", "0.95", "--output", str(tmp_path)])
    content = results.read(tmp_path / "coverage.json")
    tried = [Outcome(**values) for values in content["outcomes"]]
    assert [outcome.side for outcome in tried] == [THEIRS, OURS]
    for outcome in tried:
        assert outcome.ok, outcome.cause
        assert 0 < outcome.parameters_after < outcome.parameters_before
    assert "[1/1] resnet test_resnet  torch-pruning: ok" in capsys.readouterr().out


# All of them


def wait_for_outcomes(path: Path, count: int) -> None:
    for _ in range(500):
        if len(State.load(path, OPTIONS).outcomes) >= count:
            return
        time.sleep(0.01)


@needs_toys
def test_resume_and_fresh(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "coverage.json"
    other = Model("torchvision", "alexnet")
    asked: list[tuple[str, str]] = []
    interrupted = True

    def run(model, side: str, words) -> Outcome:
        asked.append((str(model), side))
        if interrupted and model == other:
            wait_for_outcomes(path, 2)
            raise KeyboardInterrupt
        return through(str(model), side)

    monkeypatch.setattr(cli, "run_one", run)
    words = ["--models", f"{RESNET},{other}", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        cli.main(words)
    assert set(State.load(path, OPTIONS).outcomes) == {(str(RESNET), THEIRS), (str(RESNET), OURS)}
    interrupted = False
    asked.clear()
    cli.main(words)
    assert asked == [(str(other), THEIRS), (str(other), OURS)]
    cli.main([*words, "--resume"])
    assert len(asked) == 2
    cli.main([*words, "--fresh", "--sides", OURS])
    assert asked[2:] == [(str(RESNET), OURS), (str(other), OURS)]
    assert len(State.load(path, OPTIONS).outcomes) == 4
    content = json.loads(path.read_text("utf-8"))
    content["made_by"]["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(content), "utf-8")
    assert not State.load(path, OPTIONS).outcomes
    assert "other versions" in capsys.readouterr().out


def test_models_of_a_state(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(models, "families", lambda source: {"a": ["alexnet"], "b": []})
    found = State(tmp_path / "coverage.json")
    assert found.models(["torchvision"]) == [Model("torchvision", "alexnet")]
    assert State.load(found.path, {}).choice == found.choice
    assert found.not_created() == ["torchvision b"]


OUTCOMES = [
    through("torchvision:alexnet", THEIRS),
    fallen("torchvision:alexnet", OURS, "build", "GraphError: no", refused=True, intact=True),
    fallen("torchvision:vgg11", THEIRS, "prune", "IndexError: 7\nis too much"),
    replace(through("torchvision:vgg11", OURS), allocation=6.0, passes=2.0, memory=40.0),
    fallen("torchvision:swin_t", THEIRS, "build", "no result in 9 s", hang=True, seconds=9.0),
    fallen("torchvision:swin_t", OURS, "prune", "KeyError: 3", intact=False),
    fallen("torchvision:maxvit_t", THEIRS, "prune", "IndexError: 7 is too much"),
    Outcome("torchvision:maxvit_t", OURS, ok=True, stage="export", budget="missed"),
    fallen("torchvision:googlenet", THEIRS, "create", "RuntimeError: size"),
    through("torchvision:googlenet", OURS),
]


def test_totals() -> None:
    zero = dict.fromkeys(STAGES[1:], 0)
    assert outcomes.totals(OUTCOMES, THEIRS) == {
        **zero, "side": THEIRS, "models": 4, "ok": 1, "refused": 0, "hang": 1, "prune": 2,
        "changed": 0, "missed": 0, "slowest": None, "memory": None,
    }  # fmt: skip
    assert outcomes.totals(OUTCOMES, OURS) == {
        **zero, "side": OURS, "models": 4, "ok": 2, "refused": 1, "hang": 0, "prune": 1,
        "changed": 1, "missed": 1, "slowest": 3.0, "memory": 40.0,
    }  # fmt: skip


def test_costs_of_allocations() -> None:
    cheaper = replace(OUTCOMES[3], model="torchvision:vgg13", passes=4.0, memory=None)
    rows = outcomes.costs([cheaper, *OUTCOMES])
    assert [row["model"] for row in rows] == ["torchvision:vgg11", "torchvision:vgg13"]
    assert [row["ratio"] for row in rows] == [3.0, 1.5]
    assert str(OUTCOMES[3]) == "ok (0.0 s, 70.0 %, 3.0 x, 40 MB)"


def test_samples_are_as_small_as_the_model_takes_them() -> None:
    class AtLeast(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert inputs.shape[-1] >= 100
            return inputs.mean((2, 3))

    inputs = torch.zeros(2, 3, 224, 224)
    batches = trial.sampled(AtLeast(), inputs, 40)
    assert [batch.shape for batch, _ in batches] == [(32, 3, 128, 128), (8, 3, 128, 128)]
    assert [len(labels) for _, labels in batches] == [32, 8]
    assert trial.sampled(AtLeast(), inputs, 4, 112)[0][0].shape == (4, 3, 112, 112)
    assert trial.sampled(AtLeast(), inputs[..., :96, :96], 4)[0][0].shape == (4, 3, 96, 96)


@needs_toys
def test_an_allocation_is_timed_beside_bare_passes() -> None:
    tried = trial.Trial(OURS, RESNET, 300, samples=48)
    found = tried.run(sides.PRUNE[OURS])
    assert found.ok, found.cause
    assert (found.samples, found.size) == (48, 64)
    assert found.passes > 0
    assert 0 < found.allocation < found.seconds
    assert found.ratio == found.allocation / found.passes
    assert found.memory is None or found.memory >= 0


def test_causes_and_what_is_lost() -> None:
    first = outcomes.causes(OUTCOMES)[0]
    assert (first["models"], first["cause"]) == (2, "IndexError: 7 is too much")
    assert outcomes.excluded(OUTCOMES) == {"torchvision:googlenet": "RuntimeError: size"}
    assert outcomes.lost(OUTCOMES) == ["torchvision alexnet (alexnet)"]
    assert outcomes.lost(OUTCOMES[:1]) == []
    assert outcomes.brief("KeyError: " + "x" * 200) == "KeyError: " + "x" * 80


def test_words_that_are_not_known(tmp_path: Path) -> None:
    for option in ("--sides", "--families"):
        with pytest.raises(ArgumentError, match=option):
            cli.main([option, "all", "--output", str(tmp_path)])
