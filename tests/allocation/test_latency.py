"""Latency budgets, with multiply-accumulates in the place of seconds: these can be counted."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from torch import Tensor, nn

from networks import assert_unchanged, batches, cnn, fingerprint
from nss_prune import NSSPruner
from nss_prune.allocation import latency
from nss_prune.allocation.latency import WIDTHS, Latency, evenly, seconds_by_layer
from nss_prune.discovery.whole import discover
from nss_prune.graph.costs import macs_by_module
from nss_prune.graph.slices import Slice
from nss_prune.surgery.removal import remove

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3)).double()
OVERHEAD = 500.0  # of a call, whatever is in the model


def counted(model: nn.Module, inputs: Tensor, forward) -> dict[str, float]:
    """As many seconds as there are multiply-accumulates, and as channels that are normalised."""
    macs = macs_by_module(model, inputs, forward)
    layers = {name: float(macs.get(name, 0)) for name, _ in latency.leaves(model)}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            layers[name] = float(module.num_features)
    return {**layers, "": sum(layers.values()) + OVERHEAD}


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return cnn().eval()


def removed_from(model: nn.Module, critical: Slice) -> None:
    remove(model, critical, IMAGES)


def seconds_after(model: nn.Module, critical: Slice) -> float:
    smaller = copy.deepcopy(model)
    removed_from(smaller, critical)
    return counted(smaller, IMAGES, lambda m, x: m(x))[""]


def test_seconds_are_those_timed_at_the_four_widths_and_between_them_elsewhere(model) -> None:
    groups = discover(model, IMAGES).groups
    before = fingerprint(model)
    found = Latency(groups, model, IMAGES, removed_from, timing=counted)
    assert_unchanged(model, before)
    assert found.whole == counted(model, IMAGES, lambda m, x: m(x))[""]
    for width in WIDTHS:
        critical = evenly(groups, width)
        expected = seconds_after(model, critical) if width < 1 else found.whole
        assert found.seconds(critical) == pytest.approx(expected, rel=1e-12)
    # A layer's work is proportional to its parameters here, however its sides are narrowed.
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        kept = {g.name: torch.rand(g.size, generator=generator) > 0.3 for g in groups}
        critical = Slice(kept, groups)
        assert found.seconds(critical) == pytest.approx(seconds_after(model, critical), rel=0.02)


def test_less_work_is_never_foreseen_to_take_longer(model) -> None:
    groups = discover(model, IMAGES).groups
    times = itertools.cycle([3.0, 1.0, 2.0, 0.5])  # as a busy machine may tell them

    def noisy(model: nn.Module, inputs: Tensor, forward) -> dict[str, float]:
        factor = next(times)
        return {name: factor * value for name, value in counted(model, inputs, forward).items()}

    found = Latency(groups, model, IMAGES, removed_from, timing=noisy)
    seconds = [found.seconds(evenly(groups, width / 20)) for width in range(1, 21)]
    assert seconds == sorted(seconds)


@pytest.mark.filterwarnings("ignore:no data was given")
@pytest.mark.parametrize("given", [True, False])
def test_a_budget_is_met_by_what_is_timed(model, monkeypatch, given: bool) -> None:
    monkeypatch.setattr(latency, "seconds_by_layer", counted)
    whole = counted(model, IMAGES, lambda m, x: m(x))[""]
    data = batches(40, (3, 12, 12), 2, size=40) if given else None
    pruner = NSSPruner(model, IMAGES, latency_budget=0.6, data=data)
    assert pruner.strategy == "divergence"
    pruner.step()
    share = counted(model, IMAGES, lambda m, x: m(x))[""] / whole
    assert 0.55 < share < 0.605  # one neuron more of a small layer is several percent


def test_several_steps_share_the_seconds_of_the_first_model(model, monkeypatch) -> None:
    monkeypatch.setattr(latency, "seconds_by_layer", counted)
    whole = counted(model, IMAGES, lambda m, x: m(x))[""]
    data = batches(40, (3, 12, 12), 2, size=40)
    pruner = NSSPruner(model, IMAGES, latency_budget=0.6, data=data, iterative_steps=2)
    shares = []
    for _ in range(2):
        pruner.step()
        shares.append(counted(model, IMAGES, lambda m, x: m(x))[""] / whole)
    assert shares == pytest.approx([0.8, 0.6], abs=0.04)


def test_every_leaf_is_timed_by_the_clock_and_the_model_is_left_as_found(monkeypatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: float(next(ticks)))
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    model.train()
    before = fingerprint(model)
    found = seconds_by_layer(model, torch.randn(2, 3, 32, 32))
    assert_unchanged(model, before)
    assert model.training
    leaves = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    ]
    # The clock ticks twice for each leaf, and once more at the end of the call.
    assert found == {"": 2.0 * len(leaves) + 1, **dict.fromkeys(leaves, 1.0)}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
