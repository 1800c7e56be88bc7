"""The divergence measured, against changes made one by one and differentiated numerically."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from networks import assert_unchanged, cnn, fingerprint, mlp, settled
from nss_prune import NSSPruner
from nss_prune.allocation import effects
from nss_prune.allocation.effects import measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.compensation.folding import fold
from nss_prune.core.outputs import drawn_loss
from nss_prune.discovery.whole import discover
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.statistics.consumers import consumer_statistics
from nss_prune.surgery.removal import remove

SAMPLES = 120


class Residual(nn.Module):
    """A trunk that a block and the head read, with a ReLU that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.inner = nn.Conv2d(10, 8, 3, padding=1, groups=2)
        self.outer = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.relu(self.stem(x))
        trunk = trunk + self.outer(self.relu(self.inner(trunk)))
        return self.head(self.relu(trunk).mean((2, 3)))


class Upsampling(nn.Module):
    """Readers that are no plain layers: a transposed convolution, one with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.own = OwnForward(6, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.own(self.up(self.stem(x).tanh()).tanh()).tanh().mean((2, 3)))


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def made(make) -> tuple[nn.Module, list[tuple[Tensor, None]], tuple[NeuronGroup, ...]]:
    torch.manual_seed(0)
    shape = (12,) if make is mlp else (3, 12, 12)
    inputs = torch.randn(SAMPLES, *shape).double()
    model = settled(make().double(), inputs).eval()
    data = [(inputs[:70], None), (inputs[70:], None)]
    return model, data, discover(model, inputs[:2]).groups


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("make", [mlp, cnn, Residual, Upsampling])
def test_it_is_the_fisher_information_of_the_change(make, folds: bool) -> None:
    model, data, groups = made(make)
    statistics = consumer_statistics(model, data, groups)
    nothing = {  # predicted, so that all that is measured is in what comes back
        g.name: Elimination(torch.randperm(g.size), torch.zeros(g.size).double()) for g in groups
    }
    before = fingerprint(model)

    found = measured(model, data, groups, nothing, statistics if folds else None, seed=5)
    assert_unchanged(model, before)
    generator = torch.Generator().manual_seed(5)
    inputs = torch.cat([x for x, _ in data])
    scores = model(inputs).detach().float().requires_grad_()
    for part in scores.split([len(x) for x, _ in data]):
        drawn_loss(part, generator).backward(retain_graph=True)
    drawn = scores.grad.double()
    for group in groups:
        largest = 0.0  # D never falls as more neurons go
        for count in effects._counts(group.size)[:3].tolist():
            kept = torch.ones(group.size, dtype=torch.bool)
            kept[nothing[group.name].order[:count]] = False
            critical = Slice({group.name: kept}, groups)
            moved = derivative(make, model, critical, inputs, statistics, folds)
            largest = max(largest, float((drawn * moved).sum(1).square().mean()) / 2)
            got = float(found[group.name].divergence[count - 1])
            assert got == pytest.approx(largest, rel=2e-3, abs=1e-9)


def up_of(model: nn.Module) -> nn.Module | None:
    return getattr(model, "up", None)


def derivative(make, model, critical, inputs, statistics, folds: bool, step: float = 1e-4):
    """What the scores move by for a small step towards the sliced model, by central differences."""
    other = make().double()
    other.load_state_dict(model.state_dict())
    if folds:
        fold(other.eval(), critical, statistics)
    with torch.no_grad():
        for (name, side), (_, channels) in critical.removed_channels().items():
            if side == "in":
                module = other.get_submodule(name)
                weight = module.weight.transpose(0, 1) if module is up_of(other) else module.weight
                weight[:, channels[channels < weight.shape[1]]] = 0
        ends = []
        for sign in (1, -1):
            mixed = make().double().eval()
            values = dict(model.state_dict())
            for key, value in other.state_dict().items():
                if value.is_floating_point():
                    values[key] = values[key] + sign * step * (value - values[key])
            mixed.load_state_dict(values)
            ends.append(mixed(inputs))
    return (ends[0] - ends[1]) / (2 * step)


class Normed(nn.Module):
    """A trunk that a norm over its neurons is on, some of which are far larger than others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 10)
        self.norm = nn.LayerNorm(10)
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 10)
        self.last = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)
        self.stem.weight.data[3] *= 20

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.stem(x)
        trunk = trunk + self.down(self.up(self.norm(trunk)).relu())
        return self.head(self.last(trunk))


@pytest.mark.parametrize("folds", [True, False])
def test_a_norm_over_the_neurons_is_measured_by_the_smaller_models(folds: bool) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(SAMPLES, 12).double()
    model = Normed().double().eval()
    data = [(inputs[:70], None), (inputs[70:], None)]
    groups = discover(model, inputs[:2]).groups
    (trunk,) = [group for group in groups if group.size == 10]
    statistics = consumer_statistics(model, data, groups)
    order = torch.tensor([3, 0, 1, 2, 4, 5, 6, 7, 8, 9])
    nothing = {trunk.name: Elimination(order, torch.zeros(10).double())}
    before = fingerprint(model)

    found = measured(model, data, groups, nothing, statistics if folds else None)[trunk.name]
    assert_unchanged(model, before)
    whole = model(inputs).log_softmax(1)
    least = 0.0
    for count in effects._counts(10).tolist():
        kept = {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}
        kept[trunk.name][order[:count]] = False
        critical = Slice(kept, groups)
        smaller = copy.deepcopy(model)
        if folds:
            fold(smaller, critical, statistics)
        remove(smaller, critical, inputs[:2])
        answers = smaller(inputs).log_softmax(1)
        divergence = float((whole.exp() * (whole - answers)).sum(1).mean().detach())
        least = max(least, divergence)
        assert float(found.divergence[count - 1]) == pytest.approx(least, rel=1e-6)


def test_the_gradient_drawn_has_the_fisher_information_for_covariance() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 5).mul(2).repeat(200_000, 1).requires_grad_()
    drawn_loss(scores, torch.Generator().manual_seed(0)).backward()
    chances = scores[0].detach().softmax(0)
    expected = chances.diag() - chances[:, None] * chances
    torch.testing.assert_close(scores.grad.T @ scores.grad / 200_000, expected, rtol=0, atol=3e-3)


def test_what_is_foreseen_is_never_lowered() -> None:
    model, data, groups = made(Residual)
    found = eliminations(model, data, groups)
    statistics = consumer_statistics(model, data, groups)
    higher = measured(model, data, groups, found, statistics)
    for name, elimination in found.items():
        assert torch.equal(higher[name].order, elimination.order)
        assert (higher[name].divergence >= elimination.divergence).all()
        assert (higher[name].divergence.diff() >= 0).all()
    assert any(not torch.equal(higher[n].divergence, found[n].divergence) for n in found)


def test_few_samples_and_frozen_layers() -> None:
    model, data, groups = made(mlp)
    found = eliminations(model, data, groups)
    assert measured(model, data[:1], groups, found, None) == found
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = measured(model, data, groups, found, None)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    for name, elimination in measured(model, data, groups, found, None).items():
        assert torch.equal(elimination.divergence, frozen[name].divergence)
    assert all(not parameter.grad for parameter in model.parameters())


def test_parts_and_the_whole_measure_the_same(monkeypatch) -> None:
    model, data, groups = made(cnn)
    found = eliminations(model, data, groups)
    whole = measured(model, data, groups, found, None)
    monkeypatch.setattr(effects, "MOST_VALUES", 1)
    for name, elimination in measured(model, data, groups, found, None).items():
        torch.testing.assert_close(elimination.divergence, whole[name].divergence)


def test_the_pruner_measures_what_can_be_read_twice() -> None:
    model, data, _ = made(cnn)
    batches = [(x, torch.arange(len(x)) % 3) for x, _ in data]
    twice = NSSPruner(model, data[0][0][:2], macs_budget=0.5, data=batches)
    once = NSSPruner(model, data[0][0][:2], macs_budget=0.5, data=iter(batches))
    for pruner in (twice, once):
        assert pruner.slice.removed
    raised = [
        twice.evidence.eliminations[name].divergence > elimination.divergence
        for name, elimination in once.evidence.eliminations.items()
    ]
    assert any(bool(more.any()) for more in raised)
