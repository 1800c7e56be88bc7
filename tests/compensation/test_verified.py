"""A folding that makes a consumer's output worse on the data is left out, and named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks import batches, mlp
from nss_prune import NSSPruner, Slice, profile
from nss_prune.compensation.folding import folding
from nss_prune.compensation.refit import refit
from nss_prune.compensation.solve import ConsumerFold
from nss_prune.compensation.verified import verified
from nss_prune.graph.neurons import Member, NeuronGroup


class Normed(nn.Module):
    """A norm over pruned neurons, of which one is far larger than all others."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)
        with torch.no_grad():
            self.stem.weight[3] *= 60

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.norm(self.stem(inputs)))))


def without(groups: tuple, removed: dict[str, list[int]]) -> Slice:
    kept = {}
    for group in groups:
        kept[group.name] = torch.ones(group.size, dtype=torch.bool)
        kept[group.name][removed.get(group.name, [])] = False
    return Slice(kept, groups)


def errors(model: Normed, critical: Slice, folds: dict, data: list) -> dict[str, float]:
    """Consumer -> squared distance of its outputs that stay to those of the whole model."""
    every = list(range(16)), list(range(12))
    stays = [critical.kept[name].nonzero().flatten().tolist() for name in ("stem", "hidden")]
    found = {"hidden": 0.0, "head": 0.0}
    for inputs, _ in data:
        for sample in inputs.tolist():
            whole = by_hand(model, {}, sample, *every)
            smaller = by_hand(model, folds, sample, *stays)
            for name, ours in smaller.items():
                found[name] += sum((value - whole[name][j]) ** 2 for j, value in ours.items())
    return found


def by_hand(
    model: Normed, folds: dict, sample: list[float], stem: list[int], hidden: list[int]
) -> dict[str, dict[int, float]]:
    """Consumer -> output -> its value, of a model that has only some neurons, in plain loops."""
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    for name, fold in folds.items():
        if fold.weight is not None:
            weights[f"{name}.weight"] = fold.weight.tolist()
        if fold.constant is not None:
            pairs = zip(weights[f"{name}.bias"], fold.constant.tolist(), strict=True)
            weights[f"{name}.bias"] = [bias + constant for bias, constant in pairs]

    def layer(name: str, inputs: dict[int, float], rows: list[int]) -> dict[int, float]:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return {j: bias[j] + sum(weight[j][i] * x for i, x in inputs.items()) for j in rows}

    made = layer("stem", dict(enumerate(sample)), stem)
    mean = sum(made.values()) / len(made)
    variance = sum((value - mean) ** 2 for value in made.values()) / len(made)
    scale = (variance + model.norm.eps) ** -0.5
    gains, shifts = weights["norm.weight"], weights["norm.bias"]
    normed = {i: (value - mean) * scale * gains[i] + shifts[i] for i, value in made.items()}
    put_out = layer("hidden", normed, hidden)
    seen = {j: max(value, 0.0) for j, value in put_out.items()}
    return {"hidden": put_out, "head": layer("head", seen, list(range(3)))}


def test_the_loops_are_the_model() -> None:
    model, inputs = Normed(1).double(), torch.randn(5, 6, dtype=torch.float64)
    for sample, expected in zip(inputs.tolist(), model(inputs).tolist(), strict=True):
        ours = by_hand(model, {}, sample, list(range(16)), list(range(12)))["head"]
        assert all(abs(ours[j] - value) < 1e-9 for j, value in enumerate(expected))


def test_no_error_grows_and_what_would_is_named() -> None:
    refused = worse = 0
    for seed in range(6):
        model, data = Normed(seed).double(), batches(96, (6,), 3)
        known = profile(model, data, keep_readers=True)
        critical = without(known.groups, {"stem": [3, 5, 6, 7], "hidden": [0, 1, 2]})
        folds = folding(model, critical, known.consumers)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        kept = verified(model, critical, folds, data)
        assert all(torch.equal(value, model.state_dict()[n]) for n, value in before.items())
        plain, folded = errors(model, critical, {}, data), errors(model, critical, kept, data)
        assert all(folded[name] <= plain[name] * (1 + 1e-5) for name in plain)
        unchecked = errors(model, critical, folds, data)
        worse += any(unchecked[name] > plain[name] for name in plain)
        harmful = {name for name in folds if "left unfolded" in kept[name].note}
        assert all(kept[name].weight is None for name in harmful)
        refused += len(harmful)
    assert refused
    assert worse


def test_a_folding_that_helps_stays() -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(96, (12,), 3)
    known = profile(model, data, keep_readers=True)
    critical = without(known.groups, {"1": [0, 1]})
    folds = folding(model, critical, known.consumers)
    assert verified(model, critical, folds, data) == folds


def test_a_harmful_weight_is_refused() -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(96, (12,), 3)
    critical = without(profile(model, data).groups, {"1": [0, 1]})
    worse = ConsumerFold(weight=model[3].weight.detach() * 50)
    kept = verified(model, critical, {"3": worse}, data)
    assert kept["3"].weight is None
    assert "would be" in kept["3"].note


class Late(nn.Module):
    """Its second neuron is the first input, and the head adds both neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 1)
        with torch.no_grad():
            self.stem.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
            self.head.weight.fill_(1)
            self.head.bias.fill_(0)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.stem(inputs))


@pytest.mark.parametrize(("late", "stays"), [(-1.0, False), (1.0, True), (0.4, True), (0.3, False)])
def test_what_hurts_only_samples_after_many_is_left_unfolded(late: float, stays: bool) -> None:
    """320 samples on which the removed neuron is 1, then 1,280 on which it is something else.

    Without it the head is wrong by its value v, with the constant 1 by 1 - v: the squares are
    320 + 1280 v^2 and 1280 (1 - v)^2, of which the second is smaller if v > 0.375.
    """
    model = Late().double()
    others = torch.randn(1600, 1, dtype=torch.float64)
    first = torch.cat([torch.ones(320, 1), torch.full((1280, 1), late)]).double()
    inputs = torch.cat([first, others], 1)
    data = [(part, torch.zeros(len(part), dtype=torch.long)) for part in inputs.split(64)]
    stem = NeuronGroup(
        "stem", 2, (regular_member("stem", "out", 2), regular_member("head", "in", 2)), 1
    )
    critical = Slice({"stem": torch.tensor([True, False])}, (stem,))
    fold = ConsumerFold(constant=torch.ones(1, dtype=torch.float64))
    kept = verified(model, critical, {"head": fold}, data)["head"]
    assert (kept.constant is not None) == stays
    assert ("left unfolded" in kept.note) != stays
    assert (1280 * (1 - late) ** 2 < 320 + 1280 * late**2) == stays  # the squares, by the formula


def regular_member(name: str, side: str, size: int) -> Member:
    return Member(name, side, torch.arange(size), torch.arange(size), size)


class UsedTwice(nn.Module):
    """The weight of a consumer is also used by a function of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.first(inputs))
        again = torch.nn.functional.linear(hidden, self.second.weight)
        return self.head(torch.relu(self.second(hidden)) + again)


def test_refit_touches_no_weight_that_is_used_elsewhere() -> None:
    torch.manual_seed(0)
    model, data = UsedTwice().double(), batches(96, (6,), 3)
    # Discovery leaves such a layer alone; here its neurons are given.
    members = (regular_member("first", "out", 8), regular_member("second", "in", 8))
    critical = without((NeuronGroup("first", 8, members),), {"first": [0]})
    second = model.second.weight
    folded = refit(model, critical, data)
    assert model.second.weight is second
    assert any("second" in note and "used elsewhere" in note for note in folded.notes)


def test_a_pruner_reports_what_it_left_unfolded() -> None:
    model, data = Normed(0).double(), batches(120, (6,), 3)
    pruner = NSSPruner(
        model, torch.zeros(2, 6).double(), data=data, pruning_ratio=0.5, progress=False
    )
    pruner.step()
    assert pruner.report is not None
    left = [note for note in pruner.report.notes if "left unfolded" in note]
    assert not {note.split(" ")[0] for note in left} & set(pruner.folded)
