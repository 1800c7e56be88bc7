"""The divergence predicted, against what it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from networks import assert_unchanged, cnn, fingerprint, mlp
from nss_prune import NSSPruner
from nss_prune.allocation.budget import Limits
from nss_prune.allocation.divergence import allocate, predicted
from nss_prune.allocation.elimination import (
    Elimination,
    eliminate,
    eliminations,
    sensitivities,
    shrunk,
    slopes,
)
from nss_prune.compensation.folding import fold
from nss_prune.core.draws import Draws
from nss_prune.core.outputs import outputs_of
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, DataError
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.statistics.capture import Watcher
from nss_prune.statistics.consumers import ConsumerSums, consumer_statistics

SIZES = (4, 3)
GROUPS = tuple(NeuronGroup(str(i), size, ()) for i, size in enumerate(SIZES))


def positive(size: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    root = torch.randn(size, size + 3, dtype=torch.float64)
    return root @ root.T


def missed(covariance: Tensor, information: Tensor, gone: list[int]) -> float:
    """½ tr(Γ_PP Σ_P|S), as it is written."""
    stay = [i for i in range(len(covariance)) if i not in gone]
    left = covariance[gone][:, gone]
    if stay:
        cross = covariance[gone][:, stay]
        left = left - cross @ torch.linalg.inv(covariance[stay][:, stay]) @ cross.T
    return float((information[gone][:, gone] * left).sum()) / 2


@pytest.mark.parametrize("size", [1, 2, 7, 250])
def test_the_divergence_of_every_prefix_is_the_formula(size: int) -> None:
    covariance, information = positive(size, 0), positive(size, 1)
    found = eliminate(covariance, information)
    order = found.order.tolist()
    assert sorted(order) == list(range(size))
    for count in {1, size // 3, size // 2, size - 1, size} - {0}:
        expected = missed(covariance, information, order[:count])
        assert float(found.divergence[count - 1]) == pytest.approx(expected, rel=1e-8)


def test_each_neuron_that_goes_is_the_one_that_adds_least() -> None:
    covariance, information = positive(9, 2), positive(9, 3)
    gone: list[int] = []
    for neuron in eliminate(covariance, information).order.tolist():
        rest = [n for n in range(9) if n not in gone]
        best = min(rest, key=lambda n: missed(covariance, information, [*gone, n]))
        assert neuron == best
        gone.append(neuron)


def test_a_neuron_that_others_say_costs_nothing() -> None:
    covariance = positive(5, 4)
    mixing = torch.eye(5, dtype=torch.float64)
    mixing[4] = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0])
    covariance = mixing @ covariance @ mixing.T + 1e-9 * torch.eye(5, dtype=torch.float64)
    assert float(eliminate(covariance, positive(5, 5)).divergence[0]) < 1e-6


def test_the_least_neuron_alone_costs_what_its_effect_is() -> None:
    torch.manual_seed(0)
    model = mlp()
    inputs = torch.randn(200, 12).double()
    groups = discover(model, inputs[:2]).groups
    sums = sensitivities(model, [(inputs, None)], groups, seed=3)
    effects: dict[str, Tensor] = {}

    def see(reading, gradient: Tensor) -> None:
        centred = reading.activation - reading.activation.mean((0, 2), keepdim=True)
        effects[reading.group] = (centred * gradient).sum(2).square().mean(0) / 2

    with Watcher(groups, 200, see).attached(model):
        described = outputs_of(model, [(inputs, None)])
        described.drawn_loss(model(inputs), Draws(inputs, 3)).backward()
    for name, found in sums.items():
        first, mixed, second = found.effects / 200
        mean = found.read.statistics(name, (), None).mean
        alone = (first - 2 * mean * mixed + mean**2 * second) / 2
        torch.testing.assert_close(alone, effects[name].double(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_what_is_foreseen_is_what_happens(make) -> None:
    torch.manual_seed(0)
    model = make()
    shape = (12,) if make is mlp else (3, 12, 12)
    inputs = torch.randn(600, *shape).double()
    data = [(inputs, torch.arange(600) % 3)]
    groups = discover(model, inputs[:2]).groups
    before = fingerprint(model)
    found = eliminations(model, data, groups)
    assert_unchanged(model, before)
    whole = model.eval()(inputs).log_softmax(1)
    wanted = happened = 0.0  # of all layers, each alone: one draw of labels is noise for the least
    for group in groups:
        kept = torch.ones(group.size, dtype=torch.bool)
        kept[found[group.name].order[: group.size // 4]] = False
        critical = Slice({group.name: kept}, groups)
        other = make()
        other.load_state_dict(model.state_dict())
        fold(other.eval(), critical, consumer_statistics(other, data, groups))
        with critical.masked(other), torch.no_grad():
            drift = (whole.exp() * (whole - other(inputs).log_softmax(1))).sum(1).mean()
        wanted, happened = wanted + predicted(critical, found), happened + float(drift)
    assert wanted == pytest.approx(happened, rel=0.4)


@pytest.mark.parametrize("make", [mlp, cnn])
def test_beside_the_sums_of_the_readers_the_same_is_found(make) -> None:
    torch.manual_seed(0)
    model = make()
    inputs = torch.randn(64, *((12,) if make is mlp else (3, 12, 12))).double()
    groups = discover(model, inputs[:2]).groups
    data = [(inputs[:40], None), (inputs[40:], None)]
    sums = ConsumerSums(model, groups)
    beside = eliminations(model, data, groups, reads=sums)
    for name, found in eliminations(model, data, groups).items():
        assert torch.equal(found.order, beside[name].order)
        torch.testing.assert_close(found.divergence, beside[name].divergence)
    statistics = consumer_statistics(model, data, groups)
    assert statistics.keys() == sums.statistics({}).keys()
    for name, read in sums.statistics({}).items():
        torch.testing.assert_close(read.covariance, statistics[name].covariance)


def test_labels_are_not_used_and_the_seed_decides() -> None:
    torch.manual_seed(0)
    model, inputs = mlp(), torch.randn(64, 12).double()
    groups = discover(model, inputs[:2]).groups
    first, same, other = (
        eliminations(model, [(inputs, labels)], groups, seed=seed)
        for labels, seed in ((None, 0), (torch.zeros(64, dtype=torch.long), 0), (None, 1))
    )
    for name, found in first.items():
        assert torch.equal(found.divergence, same[name].divergence)
        assert not torch.equal(found.divergence, other[name].divergence)


def test_outputs_without_a_meaning_are_refused() -> None:
    class Deciding(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs).argmax(1)

    model = Deciding(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs = torch.randn(8, 4)
    groups = discover(nn.Sequential(*model), inputs).groups
    with pytest.raises((DataError, ArgumentError), match="outputs"):
        eliminations(model, [(inputs, None)], groups)
    assert not model[2]._forward_pre_hooks


class Split(nn.Module):
    """Neurons that one layer consumes, or several that share its outputs or its inputs."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.consumers = nn.ModuleList(nn.Conv2d(16, 12 // parts, 1) for _ in range(parts))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        found = torch.cat([consumer(hidden) for consumer in self.consumers], 1)
        return found.tanh().mean((2, 3))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_one_function_whose_consumer_is_split_diverges_as_much(parts: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(300, 3, 12, 12).double()
    data = [(part, None) for part in inputs.split(100)]
    one = Split(1).double()
    other = Split(parts).double()
    other.first.load_state_dict(one.first.state_dict())
    for rows, consumer in enumerate(other.consumers):
        for name in ("weight", "bias"):
            value = getattr(one.consumers[0], name).chunk(parts)[rows]
            getattr(consumer, name).data.copy_(value)
    found, slices = [], []
    for model in (one, other):
        groups = discover(model, inputs[:2]).groups
        found.append(eliminations(model, data, groups)["first"])
        batches = [(x, torch.arange(100) % 12) for x, _ in data]
        pruner = NSSPruner(model, inputs[:2], data=batches, params_budget=0.6, progress=False)
        slices.append(pruner.slice.kept["first"])
    assert found[1].order.equal(found[0].order)
    torch.testing.assert_close(found[1].divergence, found[0].divergence, rtol=1e-6, atol=0)
    assert slices[1].equal(slices[0])


def test_two_consumers_of_different_activations_of_the_same_neurons() -> None:
    """A map and its average: Γ is the sum of both, of one sample each."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.map, self.pooled = (
                nn.Conv2d(3, 5, 3),
                nn.Conv2d(5, 4, 1),
                nn.Linear(5, 4),
            )

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs).tanh()
            return self.map(hidden).tanh().mean((2, 3)) + self.pooled(hidden.mean((2, 3)))

    torch.manual_seed(0)
    model, inputs = Both().double(), torch.randn(50, 3, 8, 8).double()
    groups = discover(model, inputs[:2]).groups
    sums = sensitivities(model, [(inputs, None)], groups, seed=1)["first"]
    maps = model.first(inputs).tanh().detach().requires_grad_()
    pooled = maps.detach().mean((2, 3)).requires_grad_()
    scores = model.map(maps).tanh().mean((2, 3)) + model.pooled(pooled)
    outputs_of(model, [(inputs, None)]).drawn_loss(scores, Draws(inputs, 1)).backward()
    expected = torch.einsum("nahw,nbhw->ab", maps.grad, maps.grad) + pooled.grad.T @ pooled.grad
    torch.testing.assert_close(sums.information, expected, rtol=1e-9, atol=1e-12)
    assert sums.samples == 50
    assert sums.inputs_per_sample == 2


def test_shrinkage_vanishes_with_the_observations_and_always_inverts() -> None:
    covariance = positive(6, 6)
    torch.testing.assert_close(shrunk(covariance, 1e12), covariance, rtol=1e-7, atol=1e-6)
    singular = torch.ones(4, 4, dtype=torch.float64)
    assert torch.linalg.cholesky(shrunk(singular, 10)).isfinite().all()
    assert torch.linalg.cholesky(shrunk(torch.zeros_like(singular), 10)).isfinite().all()


def test_slopes_are_those_of_the_lower_hull() -> None:
    divergence = torch.tensor([1.0, 1.5, 4.0, 4.2, 4.4], dtype=torch.float64)
    found = slopes(divergence)
    assert found.tolist() == pytest.approx([0.75, 0.75] + [2.9 / 3] * 3)
    assert (found.diff() >= 0).all()
    assert (found.cumsum(0) <= divergence + 1e-12).all()


def test_the_allocation_is_the_best_of_all() -> None:
    torch.manual_seed(0)
    found = {
        group.name: Elimination(
            torch.randperm(group.size),
            torch.rand(group.size, dtype=torch.float64).sort().values.cumsum(0),  # convex
        )
        for group in GROUPS
    }
    costs = (1.0, 2.0)
    total = sum(cost * size for cost, size in zip(costs, SIZES, strict=True))

    def share(critical: Slice) -> float:
        kept = [int(mask.sum()) for mask in critical.kept.values()]
        return sum(cost * k for cost, k in zip(costs, kept, strict=True)) / total

    for budget in (0.9, 0.7, 0.5, 0.4):
        critical, reached = allocate(GROUPS, found, budget, share, Limits())
        assert reached == share(critical) <= budget
        # Among all that cost no more than this one, none diverges less.
        for left in itertools.product(*(range(1, size + 1) for size in SIZES)):
            other = Slice(
                {
                    group.name: torch.zeros(group.size, dtype=torch.bool).index_fill(
                        0, found[group.name].order[group.size - k :], True
                    )
                    for group, k in zip(GROUPS, left, strict=True)
                },
                GROUPS,
            )
            if share(other) <= reached + 1e-12:
                assert predicted(critical, found) <= predicted(other, found) + 1e-9


def test_it_is_the_default_of_a_budget_with_data() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(40, 12).double()
    data = [(inputs, torch.arange(40) % 3)]
    assert NSSPruner(mlp(), inputs[:2], params_budget=0.5, data=data).strategy == "divergence"
    assert NSSPruner(mlp(), inputs[:2], theta=0.9, data=data).strategy == "semantic"
    assert NSSPruner(mlp(), inputs[:2], params_budget=0.5).strategy == "divergence"
    with pytest.raises(ArgumentError, match="budget"):
        NSSPruner(mlp(), inputs[:2], theta=0.9, data=data, strategy="divergence")


def test_dead_and_repeated_neurons_go_first() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(100, 30)
    inputs[:, 7] = 0
    inputs[:, 8] = inputs[:, 9]
    covariance = shrunk(inputs.T.double().cov(), 1e9)
    found = eliminate(covariance, torch.ones(30, 30, dtype=torch.float64))
    assert found.divergence.isfinite().all()
    assert (found.divergence.diff() >= 0).all()
    assert set(found.order[:2].tolist()) in ({7, 8}, {7, 9})
