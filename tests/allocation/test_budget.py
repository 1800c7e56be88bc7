"""Budgets against what is really left after the removal, limits against their definition."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from torch import nn

from networks import assert_unchanged, batches, cnn, fingerprint, mlp
from nss_prune import NSSPruner, profile
from nss_prune.allocation.budget import Limits, limited, mac_share, parameter_share, solve
from nss_prune.allocation.importance import NSSImportance
from nss_prune.errors import ArgumentError
from nss_prune.graph.costs import measure
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.surgery.removal import remove

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3)).double()


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return cnn()


@pytest.fixture
def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return batches(40, (3, 12, 12), 2, size=40)


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("kind", ["params_budget", "macs_budget"])
def test_budget_is_the_largest_that_fits(model, data, kind: str, budget: float) -> None:
    before = measure(model, IMAGES)
    pruner = NSSPruner(model, IMAGES, data=data, **{kind: budget})
    pruner.step()
    after = measure(model, IMAGES)
    cost = {"params_budget": "parameters", "macs_budget": "macs"}[kind]
    share = getattr(after, cost) / getattr(before, cost)
    assert share <= budget
    named = [note for note in pruner.report.notes if "the budget is" in note]
    assert bool(named) == (budget - share > 0.01)


def test_the_slice_is_that_of_the_search_over_all_thresholds(model, data) -> None:
    known = profile(model, data)
    scores = NSSImportance(known).scores
    share = parameter_share(known.groups, model, sum(p.numel() for p in model.parameters()))
    critical, reached = solve(known.groups, scores.__getitem__, 0.5, share, Limits())
    # One threshold for all layers: whatever stays scores higher than whatever goes, but for the
    # one neuron that each layer keeps in any case.
    inside = min(float(scores[n][k].min()) for n, k in critical.kept.items() if int(k.sum()) > 1)
    outside = max(float(scores[n][~k].max()) for n, k in critical.kept.items() if not k.all())
    assert outside < inside
    assert reached == share(critical) <= 0.5


def test_costs_foreseen_are_those_measured(model, data) -> None:
    whole = measure(model, IMAGES)
    critical = profile(model, data).slice(0.8)
    parameters = parameter_share(critical.groups, model, whole.parameters)(critical)
    macs = mac_share(critical.groups, model, whole.macs, IMAGES)(critical)
    after = measure(remove(model, critical, IMAGES), IMAGES)
    assert parameters * whole.parameters == pytest.approx(after.parameters)
    assert macs * whole.macs == pytest.approx(after.macs, rel=1e-9)


def test_macs_of_layers_with_one_weight_are_foreseen() -> None:
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 2)
    )
    model[3].weight = model[1].weight
    inputs = torch.randn(3, 5)
    neurons = NSSPruner(model, inputs, params_budget=0.9, progress=False).neurons
    kept = {group.name: torch.arange(group.size) < 3 for group in neurons.groups}
    critical = Slice(kept, neurons.groups)
    macs = mac_share(neurons.groups, model, 1, inputs)(critical)
    assert macs == measure(remove(model, critical, inputs), inputs).macs == 3 * (15 + 9 + 9 + 6)


def test_macs_of_a_transformer_are_foreseen() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3).eval()
    size = model.pretrained_cfg["input_size"]
    inputs = torch.randn(2, *size)
    data = [(torch.randn(8, *size), torch.arange(8) % 2)]
    pruner = NSSPruner(model, inputs, macs_budget=0.7, data=data)
    before = measure(model, inputs).macs
    pruner.step()
    assert measure(model, inputs).macs / before == pytest.approx(0.7, abs=0.011)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_macs_of_a_recurrent_layer_are_foreseen(kind) -> None:
    """Tokens times gates times hidden units times (inputs + hidden units), before and after."""
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}[kind]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), kind(8, 5, batch_first=True))
    members = (
        Member("0", "out", torch.arange(8), torch.arange(8), 8),
        Member("2", "in", torch.arange(8), torch.arange(8), 8),
    )
    group = NeuronGroup("0", 8, members)
    share = mac_share((group,), model, 1, torch.zeros(3, 4, 6))
    for kept in (8, 5, 2):
        stays = torch.arange(8) < kept
        by_hand = 3 * 4 * (6 * kept + gates * 5 * (kept + 5))
        assert share(Slice({"0": stays}, (group,))) == pytest.approx(by_hand)


def test_steps_share_the_budget(data) -> None:
    torch.manual_seed(0)
    model = cnn()
    before = sum(p.numel() for p in model.parameters())
    pruner = NSSPruner(model, IMAGES, data=data, params_budget=0.4, iterative_steps=2)
    pruner.step()
    half = sum(p.numel() for p in model.parameters()) / before
    pruner.step()
    whole = sum(p.numel() for p in model.parameters()) / before
    assert 0.5 < half <= 0.7
    assert whole <= 0.4


@pytest.mark.parametrize("strategy", ["semantic", "divergence"])
def test_a_budget_out_of_reach_is_said_and_ruins_nothing(model, data, strategy: str) -> None:
    pruner = NSSPruner(
        model, IMAGES, data=data, params_budget=0.02, strategy=strategy, ignored_layers=[model[4]]
    )
    pruner.step()
    assert any("may go are gone" in note for note in pruner.report.notes)
    assert model[4].out_channels == 10
    rows = [row for row in pruner.report.rows if not row.reason]
    assert rows
    assert all(row.after == math.ceil(row.before / 10) for row in rows)


def test_a_budget_within_reach_may_go_below_the_floor() -> None:
    groups = (NeuronGroup("a", 20, ()), NeuronGroup("b", 20, ()))
    scores = {"a": torch.arange(20.0), "b": torch.arange(100.0, 120.0)}

    def share(critical: Slice) -> float:
        return sum(float(kept.float().mean()) for kept in critical.kept.values()) / 2

    limits = Limits(floor={"a": 2, "b": 2})
    near, reached = solve(groups, scores.__getitem__, 0.08, share, limits)
    assert [int(kept.sum()) for kept in near.kept.values()] == [1, 2]
    assert reached == pytest.approx(0.075)
    far, reached = solve(groups, scores.__getitem__, 0.04, share, limits)
    assert [int(kept.sum()) for kept in far.kept.values()] == [2, 2]
    assert reached == pytest.approx(0.1)


@pytest.mark.parametrize("how", [{"pruning_ratio": 0.95}, {"params_budget": 0.1}, {"theta": 0.01}])
def test_a_norm_over_the_neurons_keeps_two_of_each_group(how) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GroupNorm(2, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = torch.randn(64, 8)
    NSSPruner(model, inputs, data=[(inputs, torch.arange(64) % 4)], **how).step()
    assert model[0].out_features >= 4
    assert model(inputs).std(0).max() > 1e-3


@pytest.mark.parametrize("round_to", [1, 3, 4])
@pytest.mark.parametrize("least", [1, 5])
def test_limits(round_to: int, least: int) -> None:
    limits = Limits({"a": least}, round_to)
    for size, wanted in itertools.product((1, 2, 7, 16), range(1, 17)):
        if wanted > size:
            continue
        kept = limits.kept("a", size, wanted)
        assert min(size, max(wanted, least)) <= kept <= size
        assert kept % round_to == 0 or kept == size
        assert kept - max(wanted, min(least, size)) < round_to


def test_limits_add_the_best_of_those_outside(data) -> None:
    torch.manual_seed(0)
    known = profile(cnn(), data)
    scores = NSSImportance(known).scores
    critical = known.slice(0.7)
    more = limited(critical, Limits({}, 4), scores.__getitem__)
    for name, mask in critical.kept.items():
        assert not (mask & ~more.kept[name]).any()
        added = more.kept[name] & ~mask
        if added.any() and not more.kept[name].all():
            assert scores[name][added].min() > scores[name][~more.kept[name]].max()


@pytest.mark.parametrize("how", [{"theta": 0.3}, {"pruning_ratio": 0.9}, {"params_budget": 0.1}])
def test_max_pruning_ratio_and_round_to_hold(data, how) -> None:
    torch.manual_seed(0)
    model = cnn()
    sizes = {name: m.weight.shape[0] for name, m in model.named_modules() if hasattr(m, "weight")}
    pruner = NSSPruner(model, IMAGES, data=data, max_pruning_ratio=0.4, round_to=2, **how)
    pruner.step()
    assert sum(row.before - row.after for row in pruner.report.rows) > 0
    for row in pruner.report.rows:
        assert row.after >= 0.6 * sizes[row.layer]
        assert row.after % 2 == 0 or row.after == row.before


def test_every_reader_keeps_something_to_read() -> None:
    whole, left, right = torch.arange(8), torch.arange(4), torch.arange(4, 8)
    members = (
        Member("maker", "out", whole, whole, 8),
        Member("left", "in", left, left, 4),
        Member("right", "in", left, right, 4),
    )
    groups = (NeuronGroup("maker", 8, members),)
    scores = {"maker": torch.tensor([9.0, 8, 7, 6, 1, 3, 2, 0])}
    critical = Slice({"maker": scores["maker"] > 6}, groups)
    kept = limited(critical, Limits(), scores.__getitem__).kept["maker"]
    assert kept.tolist() == [True, True, True, False, False, True, False, False]

    def share(critical: Slice) -> float:
        return float(critical.kept["maker"].float().mean())

    best, _ = solve(groups, scores.__getitem__, 0.3, share, Limits())
    assert best.kept["maker"].tolist() == [True] + [False] * 4 + [True] + [False] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params_budget": 0.0}, "share to keep"),
        ({"macs_budget": 1.5}, "share to keep"),
        ({"latency_budget": -0.5}, "share to keep"),
        ({"params_budget": 0.5, "pruning_ratio": 0.5}, "one of them"),
        ({"params_budget": 0.5, "theta": 0.9}, "no effect"),
        ({"budget": 0.5}, "give both"),
        ({"timeout": 0}, "seconds"),
    ],
)
def test_bad_budgets(arguments, message: str) -> None:
    model = mlp()
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=message):
        NSSPruner(model, torch.randn(4, 12).double(), **arguments)
    assert_unchanged(model, before)
