"""A folding that makes a consumer's output worse on the data is left out, and named."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks import batches, mlp
from nss_prune import NSSPruner, Slice, profile
from nss_prune.compensation.folding import folding
from nss_prune.compensation.refit import refit
from nss_prune.compensation.solve import ConsumerFold
from nss_prune.compensation.verified import OUTPUTS, _errors, verified


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


def test_no_error_grows_and_what_would_is_named() -> None:
    refused = 0
    for seed in range(6):
        model, data = Normed(seed).double(), batches(96, (6,), 3)
        known = profile(model, data, keep_readers=True)
        critical = without(known.groups, {"stem": [3, 5, 6, 7], "hidden": [0, 1, 2]})
        folds = folding(model, critical, known.consumers)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        kept = verified(model, critical, folds, data)
        assert all(torch.equal(value, model.state_dict()[n]) for n, value in before.items())
        # The oracle: run both models and compare what each consumer puts out.
        plain = _errors(model, critical, {}, data, lambda m, x: m(x))
        folded = _errors(model, critical, kept, data, lambda m, x: m(x))
        assert all(folded[name] <= plain[name] * (1 + 1e-5) for name in plain)
        assert folded.keys() == {"hidden", "head", OUTPUTS}
        harmful = {name for name in folds if "left unfolded" in kept[name].note}
        assert all(kept[name].weight is None for name in harmful)
        refused += len(harmful)
    assert refused


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
    known = profile(model, data)
    critical = without(known.groups, {known.groups[0].name: [0]})
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
