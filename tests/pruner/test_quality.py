"""The smallest model that is good enough, against exhaustive search."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
from torch import Tensor, nn

from networks import assert_unchanged, fingerprint, mlp
from nss_prune import NSSPruner, Slice, Views, accuracy_on, remove
from nss_prune.allocation.budget import Limits
from nss_prune.allocation.elimination import Elimination
from nss_prune.allocation.interactions import Predictor
from nss_prune.allocation.path import STEPS, Path, smallest_passing, within_divergence
from nss_prune.compensation.folding import fold
from nss_prune.errors import ArgumentError, NumericalError
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.pruner.eliminating import Eliminating
from nss_prune.pruner.halves import halves_of
from nss_prune.pruner.measuring import Measuring
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import Upkeep

SIZES = {"a": 60, "b": 41, "c": 7}
GROUPS = tuple(NeuronGroup(name, size, ()) for name, size in SIZES.items())


def toy() -> tuple[dict[str, Elimination], object]:
    """Eliminations, and a cost that grows with products of neighbouring layers."""
    torch.manual_seed(2)
    found = {
        name: Elimination(torch.randperm(size), torch.rand(size).double().square().cumsum(0) / size)
        for name, size in SIZES.items()
    }
    whole = 60 * 41 + 41 * 7

    def share(critical) -> float:
        a, b, c = (int(critical.kept[name].sum()) for name in SIZES)
        return (a * b + b * c) / whole

    return found, share


@pytest.mark.parametrize("limit", [0.0, 0.02, 0.1, 0.4, 100.0])
def test_the_divergence_is_met_and_no_smaller_slice_of_the_path_meets_it(limit: float) -> None:
    found, share = toy()
    predictor = Predictor(found)
    chosen = within_divergence(GROUPS, found, predictor, limit, share, Limits())
    assert predictor.of(chosen) <= limit
    # On the path of the costs at the solution itself, none is smaller by more than rounds differ.
    path = Path(GROUPS, found, share, Limits())
    meeting = [count for count in range(path.last + 1) if predictor.of(path.slice(count)) <= limit]
    assert share(chosen) <= path.share(max(meeting))
    nested = [path.slice(count) for count in range(path.last + 1)]
    for larger, smaller in itertools.pairwise(nested):
        assert all((larger.kept[name] | ~smaller.kept[name]).all() for name in SIZES)
    expected = [predictor.of(one) for one in nested]
    torch.testing.assert_close(path.divergence(predictor).tolist(), expected)


@pytest.mark.parametrize("least", [0.05, 0.3, 0.31, 0.77, 1.0, -1.0])
def test_bisection_finds_what_trying_all_sizes_finds(least: float) -> None:
    found, share = toy()
    path = Path(GROUPS, found, share, Limits())
    tried: list[tuple[int, ...]] = []

    def passes(critical) -> bool:  # monotone along the path
        tried.append(tuple(int(kept.sum()) for kept in critical.kept.values()))
        return share(critical) >= least

    chosen = smallest_passing(path, passes)
    sizes = [path.slice(path.within(1 - step / STEPS)) for step in range(STEPS + 1)]
    best = [one for one in sizes if share(one) >= least] or sizes[:1]
    assert share(chosen) == min(share(one) for one in best)
    assert len(tried) == len(set(tried)) <= 7


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model, truth = mlp(10, (40, 24), 4), torch.randn(10, 4).double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):  # on new samples: of those that it has seen, a model is too sure
        inputs = torch.randn(200, 10).double()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), (inputs @ truth).tanh().argmax(1)).backward()
        optimizer.step()
    inputs = torch.randn(1500, 10).double()
    return model.eval(), inputs, (inputs @ truth).tanh().argmax(1)


def batches(inputs: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(100), labels.split(100), strict=True))


@pytest.mark.parametrize("cost", ["macs", "parameters", lambda critical: -1 + sum(
    int(kept.sum()) for kept in critical.kept.values())])  # fmt: skip
def test_max_divergence(trained, cost) -> None:
    base, inputs, labels = trained
    model = copy.deepcopy(base)
    pruner = NSSPruner(
        model,
        inputs[:2],
        data=batches(inputs[:1000], labels[:1000]),
        max_divergence=0.03,
        cost=cost,
    )
    before = fingerprint(model)
    predictor, chosen = pruner.evidence.predictor, pruner.slice
    assert_unchanged(model, before)
    assert predictor.has_cross_terms
    assert 0.015 < predictor.of(chosen) <= 0.03
    pruner.step()
    (note,) = (n for n in pruner.report.notes if "max_divergence" in n)
    assert "0.03" in note
    assert f"{predictor.of(chosen):.4g} nats" in note
    calibrating, fresh = kl(base, model, inputs[:1000]), kl(base, model, inputs[1000:])
    estimated = float(note.rpartition("measured ")[2].rstrip(")"))
    assert calibrating * 0.999 <= estimated <= 0.03
    assert estimated / 1.5 < fresh < estimated * 1.5
    assert 0.03 / 1.5 < fresh < 0.03 * 1.5


@torch.no_grad()
def kl(whole: nn.Module, smaller: nn.Module, inputs: Tensor) -> float:
    wanted, got = (net(inputs).log_softmax(1) for net in (whole, smaller))
    return float((wanted.exp() * (wanted - got)).sum(1).mean())


def test_halves_are_all_samples_once_whatever_their_order(trained) -> None:
    _, inputs, labels = trained
    found = []
    for order in (torch.arange(1000), torch.randperm(1000)):
        for half in halves_of(batches(inputs[order], labels[order])):
            rows = torch.cat([torch.cat([x, y[:, None].double()], 1) for x, y in half])
            found.append({tuple(row) for row in rows.tolist()})
    assert found[:2] == found[2:]
    assert not found[0] & found[1]
    assert len(found[0] | found[1]) == 1000
    assert 400 < len(found[0]) < 600
    views = halves_of(Views(batches(inputs[:300], labels[:300]), torch.neg))
    assert sum(len(x) for half in views for x, _ in half) == 600
    assert all(torch.equal(x[::2], -x[1::2]) for half in views for x, _ in half)
    few = batches(inputs[:150], labels[:150])
    assert halves_of(few) == halves_of(iter(few)) == halves_of(None) == ()


def test_new_samples_are_estimated_from_what_each_half_makes_of_the_other(trained) -> None:
    """By hand: prune a copy with either half, to the same sizes, and measure on the other."""
    base, inputs, labels = trained
    data = batches(inputs[:600], labels[:600])
    pruner = NSSPruner(copy.deepcopy(base), inputs[:2], data=data, max_divergence=0.1)
    chosen, evidence = pruner.slice, pruner.evidence
    sizes = {name: int(kept.sum()) for name, kept in chosen.kept.items()}
    parts, other = [list(half) for half in halves_of(data)], []
    for half, rest in (parts, parts[::-1]):
        model = copy.deepcopy(base)
        found = NSSPruner(model, inputs[:2], data=half, macs_budget=0.5, round_to=1)
        kept = {}
        for name, elimination in found.evidence.eliminations.items():
            kept[name] = torch.zeros(len(elimination.order), dtype=torch.bool)
            kept[name][elimination.order.flip(0)[: sizes[name]]] = True
        fold(model, Slice(kept, chosen.groups), found.evidence.statistics)
        remove(model, Slice(kept, chosen.groups), inputs[:2])
        other.append(kl(base, model, torch.cat([x for x, _ in rest])))
    pruner.step()
    own = kl(base, pruner.model, inputs[:600])
    wanted = max(own, (own + other[0] + other[1]) / 3)
    assert len(evidence.halves) == 2
    (note,) = (n for n in pruner.report.notes if "max_divergence" in n)
    assert float(note.rpartition("measured ")[2].rstrip(")")) == pytest.approx(wanted, rel=1e-3)


@torch.no_grad()
def test_where_outputs_are_sure_what_is_measured_limits_the_size(trained) -> None:
    """Scores eight times as large: the second order sees little, the measurement all of it."""
    base, inputs, labels = trained
    model = copy.deepcopy(base)
    model[-1].weight.mul_(8)
    model[-1].bias.mul_(8)
    whole, data = copy.deepcopy(model), batches(inputs[:1000], labels[:1000])
    pruner = NSSPruner(model, inputs[:2], data=data, max_divergence=0.05)
    before = fingerprint(model)
    predicted = pruner.evidence.predictor.of(pruner.slice)
    assert_unchanged(model, before)
    pruner.step()
    assert kl(whole, model, inputs[:1000]) <= 0.05
    assert 0.5 * 0.05 < kl(whole, model, inputs[1000:]) < 1.5 * 0.05
    assert predicted < 0.8 * 0.05  # less than the prediction alone would have allowed


def test_costs_are_made_least_each_its_own(trained) -> None:
    base, inputs, labels = trained
    data, left = batches(inputs[:1000], labels[:1000]), {}
    for cost in ("macs", "parameters"):
        model = copy.deepcopy(base)
        pruner = NSSPruner(model, inputs[:2], data=data, max_divergence=0.03, cost=cost, round_to=4)
        pruner.step()
        left[cost] = pruner.report.after
        assert all(int(kept.sum()) % 4 == 0 for kept in pruner.slice.kept.values())
    assert left["macs"].macs <= left["parameters"].macs
    assert left["parameters"].parameters <= left["macs"].parameters


@pytest.mark.parametrize("extra", [{}, {"balance": True}, {"fold": False}, {"fold": "refit"}])
def test_a_score_is_that_of_the_model_that_comes_out(trained, extra) -> None:
    base, inputs, labels = trained
    model, scored = copy.deepcopy(base), []
    measure = accuracy_on(batches(inputs[1000:], labels[1000:]))

    def score(one: nn.Module) -> float:
        scored.append(measure(one))
        return scored[-1]

    pruner = NSSPruner(
        model, inputs[:2], data=batches(inputs[:1000], labels[:1000]), score=score, max_drop=2.0,
        **extra,
    )  # fmt: skip
    before = fingerprint(model)
    chosen = pruner.slice
    assert_unchanged(model, before)
    whole = measure(base)
    assert scored[0] == whole
    assert len(scored) <= 8
    pruner.step()
    assert len(scored) <= 8
    assert (
        whole - 2.0
        <= measure(model)
        == pytest.approx(next(one for one in scored if f"score {one:.6g}," in chosen.rule))
    )
    assert pruner.report.after.macs < pruner.report.before.macs
    assert any("max_drop 2" in note for note in pruner.report.notes)


def test_a_least_score(trained) -> None:
    base, inputs, labels = trained
    model, data = copy.deepcopy(base), batches(inputs[:1000], labels[:1000])
    measure = accuracy_on(batches(inputs[1000:], labels[1000:]))
    NSSPruner(model, inputs[:2], data=data, score=measure, min_score=80.0).step()
    assert measure(model) >= 80
    model = copy.deepcopy(base)
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=r"min_score is 100\.5, and the whole model scores"):
        NSSPruner(model, inputs[:2], data=data, score=measure, min_score=100.5).step()
    assert_unchanged(model, before)
    before = fingerprint(model)
    with pytest.raises(NumericalError, match="NaN"):
        NSSPruner(model, inputs[:2], data=data, score=lambda _: float("nan"), max_drop=1).step()
    assert_unchanged(model, before)


def test_an_error_of_the_score_leaves_the_model_alone(trained) -> None:
    base, inputs, labels = trained
    model, calls = copy.deepcopy(base), []
    before = fingerprint(model)

    def score(one: nn.Module) -> float:
        calls.append(one)
        if len(calls) == 3:
            raise ValueError("mine")
        return 1.0

    data = batches(inputs[:1000], labels[:1000])
    with pytest.raises(ValueError, match="mine"):
        NSSPruner(model, inputs[:2], data=data, score=score, max_drop=0).step()
    assert_unchanged(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_several_budgets_hold_at_once(trained) -> None:
    base, inputs, labels = trained
    data = batches(inputs[:1000], labels[:1000])
    for macs, parameters in ((0.6, 0.3), (0.3, 0.6)):
        model = copy.deepcopy(base)
        pruner = NSSPruner(model, inputs[:2], data=data, macs_budget=macs, params_budget=parameters)
        pruner.step()
        report = pruner.report
        kept = (
            report.after.macs / report.before.macs,
            report.after.parameters / report.before.parameters,
        )
        assert kept[0] <= macs
        assert kept[1] <= parameters
        assert max(kept[0] - macs, kept[1] - parameters) > -0.03
        assert not any("budget" in note for note in report.notes)


CONTRADICTIONS = {
    "two sizes": ("leave one out", {"max_divergence": 0.1, "macs_budget": 0.5}),
    "size and theta": ("no effect", {"max_divergence": 0.1, "theta": 0.9}),
    "ratio": ("leave one|one of them", {"max_divergence": 0.1, "pruning_ratio": 0.5}),
    "divergence and score": ("leave the other", {"max_divergence": 0.1, "score": len}),
    "score alone": ("given alone", {"score": len}),
    "drop alone": ("given alone", {"max_drop": 1.0}),
    "drop and least": ("both given", {"score": len, "max_drop": 1.0, "min_score": 3.0}),
    "negative": ("0 or above", {"max_divergence": -0.1}),
    "NaN": ("0 or above", {"score": len, "max_drop": float("nan")}),
    "no function": ("function of the model", {"score": "accuracy", "max_drop": 1.0}),
    "no data": ("give data=", {"max_divergence": 0.1, "data": None}),
    "strategy": ("leave strategy=", {"max_divergence": 0.1, "strategy": "semantic"}),
    "importance": ("no importance", {"max_divergence": 0.1, "importance": len}),
    "steps": ("iterative_steps", {"max_divergence": 0.1, "iterative_steps": 2}),
    "cost": ("cost is 'flops'", {"max_divergence": 0.1, "cost": "flops"}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_arguments_that_contradict_each_other(case: str) -> None:
    message, arguments = CONTRADICTIONS[case]
    model, inputs = mlp(), torch.randn(120, 12).double()
    before = fingerprint(model)
    data = [(inputs, torch.arange(120) % 3)]
    with pytest.raises(ArgumentError, match=message):
        NSSPruner(model, inputs[:2], **{"data": data, **arguments})
    assert_unchanged(model, before)


@pytest.fixture(scope="module")
def attention() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3,
        num_classes=5,
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.head.weight.mul_(50)
    inputs = torch.randn(240, 3, 32, 32)
    with torch.no_grad():
        labels = model(inputs).argmax(1)
    return model, list(zip(inputs.split(80), labels.split(80), strict=True))


@pytest.mark.parametrize("extra", [{}, {"fold": False}, {"fold": "refit"}])
def test_a_divergence_is_met_inside_heads(attention, extra) -> None:
    model, data = copy.deepcopy(attention[0]), attention[1]
    pruner = NSSPruner(model, data[0][0][:2], data=data, max_divergence=0.02, progress=False,
                       round_to=1, **extra)  # fmt: skip
    before = fingerprint(model)
    chosen = pruner.slice
    assert_unchanged(model, before)
    assert chosen.bases
    assert not chosen.kept["blocks.0.attn"].all()
    pruner.step()
    (note,) = (n for n in pruner.report.notes if "max_divergence" in n)
    measured = float(note.rpartition("measured ")[2].rstrip(")"))
    if "refit" not in extra.values():  # which goes on after what is measured
        found = kl(attention[0], model, torch.cat([x for x, _ in data]))
        assert found * 0.999 <= measured <= 0.02


def test_a_plan_inside_heads_is_measured_as_it_comes_out(attention) -> None:
    model, data = copy.deepcopy(attention[0]), attention[1]
    eliminating = Eliminating(data, folds=True, upkeep=Upkeep(progress=False))
    pruner = NSSPruner(model, data[0][0][:2], data=data, macs_budget=0.6, progress=False)
    chosen = pruner.slice
    assert chosen.bases
    subject = Subject(model, data[0][0][:2], pruner.evidence.neurons)
    measuring = Measuring(subject, pruner.evidence, eliminating, pruner.repairs)
    measured = measuring.divergence(chosen)
    pruner.step()
    found = kl(attention[0], model, torch.cat([x for x, _ in data]))
    assert measured == pytest.approx(found, rel=1e-3)


def mostly_attention(critical) -> float:
    inside = critical.kept.get("blocks.0.attn", torch.ones(8))
    return 50 * int(inside.sum()) + sum(int(kept.sum()) for kept in critical.kept.values())


@pytest.mark.parametrize("extra", [{}, {"fold": False}, {"balance": True}, {"fold": "refit"}])
def test_a_score_is_measured_inside_heads(attention, extra) -> None:
    data, measure = attention[1], accuracy_on(attention[1])
    common = {"data": data, "score": measure, "max_drop": 5.0, "cost": mostly_attention,
              "progress": False, "round_to": 1, **extra}  # fmt: skip
    model = copy.deepcopy(attention[0])
    pruner = NSSPruner(model, data[0][0][:2], **common)
    before = fingerprint(model)
    chosen = pruner.slice
    assert_unchanged(model, before)
    assert not chosen.kept["blocks.0.attn"].all()
    assert chosen.bases
    pruner.step()
    assert measure(model) >= 95
    assert f"score {measure(model):.6g}," in chosen.rule
    whole = NSSPruner(model := copy.deepcopy(attention[0]), data[0][0][:2], prune_head_dims=False,
                      **common)  # fmt: skip
    whole.step()
    assert model.blocks[0].attn.head_dim == 8
