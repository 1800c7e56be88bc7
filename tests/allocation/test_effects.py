"""The divergence measured, against changes made one by one and differentiated numerically."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from networks import assert_unchanged, cnn, fingerprint, mlp, settled
from nss_prune import NSSPruner
from nss_prune.allocation import effects
from nss_prune.allocation.effects import measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.core.draws import Draws
from nss_prune.core.outputs import outputs_of
from nss_prune.discovery.whole import discover
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.statistics.consumers import consumer_statistics

SAMPLES = 120


class OwnNorm(nn.Module):
    """By the mean size, with a weight, in double precision whatever comes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + 0.1) * self.weight + self.bias


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, OwnNorm)


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
    """Consumers that are no plain layers: a transposed convolution, one with a forward of its
    own."""

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
    assert_measured_as_differentiated(*made(make), folds)


def assert_measured_as_differentiated(model, data, groups, folds: bool) -> None:
    """½ E[e²] with e = d/dt of the drawn loss where consumers receive x + t Δ, by differences."""
    statistics = consumer_statistics(model, data, groups)
    nothing = {  # predicted, so that all that is measured is in what comes back
        g.name: Elimination(torch.randperm(g.size), torch.zeros(g.size).double()) for g in groups
    }
    before = fingerprint(model)
    found = measured(model, data, groups, nothing, statistics if folds else None, seed=5)
    assert_unchanged(model, before)
    inputs = torch.cat([x for x, _ in data])
    scores = model(inputs).detach().requires_grad_()
    loss = outputs_of(model, data).drawn_loss(scores, Draws(inputs, 5))
    (drawn,) = torch.autograd.grad(loss, scores)
    for group in groups:
        largest = 0.0  # D never falls as more neurons go
        for count in effects._counts(group.size).tolist():
            gone = nothing[group.name].order[:count]
            moved = derivative(model, group, gone, inputs, statistics if folds else None)
            largest = max(largest, float((drawn * moved).flatten(1).sum(1).square().mean()) / 2)
            got = float(found[group.name].divergence[count - 1])
            assert got == pytest.approx(largest, rel=2e-3, abs=1e-9)


def derivative(model, group, gone, inputs, statistics, step: float = 1e-4) -> Tensor:
    """What the outputs move by for a small step of all changes, by central differences."""
    changes: dict[str, Tensor] = {}
    members = {owner(member): member for member in group.members}

    def see(name: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            member = members[name]
            channels = member.channels[torch.isin(member.neurons, gone)]
            lost = torch.isin(torch.arange(member.width), channels)
            if member.side == "in":
                changes[name] = change_of_input(module, arguments[0], lost, statistics, name)
            elif isinstance(module, NORMS):
                changes[name] = change_of_norm(module, arguments[0], output, ~lost)

        return hook

    run_hooked(model, inputs, {name: ("after", see(name)) for name in members})
    ends = []
    for sign in (1, -1):
        moving = {}
        for name, change in changes.items():
            by = sign * step * change
            if members[name].side == "in":
                moving[name] = ("before", lambda _, given, by=by: (given[0] + by,))
            else:
                moving[name] = ("after", lambda _, given, output, by=by: output + by)
        ends.append(run_hooked(model, inputs, moving))
    return (ends[0] - ends[1]) / (2 * step)


def owner(member: Member) -> str:
    """The module that a member lies in."""
    return member.name if member.axis is None else member.name.rpartition(".")[0]


def run_hooked(model: nn.Module, inputs: Tensor, hooks: dict) -> Tensor:
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, (when, hook) in hooks.items():
            module = model.get_submodule(name)
            before, after = module.register_forward_pre_hook, module.register_forward_hook
            stack.callback((before if when == "before" else after)(hook).remove)
        return model(inputs)


def change_of_input(module, x: Tensor, lost: Tensor, statistics, name: str) -> Tensor:
    """B (x_S - mean_S) - (x_P - mean_P) in the channels P that are lost, B = Σ_PS Σ_SS⁻¹."""
    is_convolution = isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
    last = x.movedim(1, -1) if is_convolution else x
    change = torch.zeros_like(last)
    if statistics is None:
        change[..., lost] = -last[..., lost]
        return change.movedim(-1, 1) if is_convolution else change
    found = statistics[name]
    if found.observations < 2 * len(found.mean) and len(found.mean) > 60:
        found = found.by_neuron(len(found.mean) // 10)  # the map behind the 10 channels of cnn
    repeats = len(found.mean) // len(found.covariance)
    blocks = getattr(module, "groups", 1)
    unit = torch.arange(len(found.covariance)) * blocks // len(found.covariance)
    covariance = oas(found.covariance * (unit[:, None] == unit), found.observations)
    p, s = lost.view(-1, repeats)[:, 0], ~lost.view(-1, repeats)[:, 0]
    mixing = covariance[p][:, s] @ torch.linalg.inv(covariance[s][:, s])
    centred = (last - found.mean).unflatten(-1, (-1, repeats))
    explained = torch.einsum("ps,...sr->...pr", mixing, centred[..., s, :])
    change = torch.zeros_like(centred)
    change[..., p, :] = explained - centred[..., p, :]
    return change.flatten(-2).movedim(-1, 1) if is_convolution else change.flatten(-2)


def oas(covariance: Tensor, n: float) -> Tensor:
    """Chen et al. (2010), eq. 23, written out."""
    p = len(covariance)
    square, trace = float((covariance @ covariance).trace()), float(covariance.trace())
    share = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    share = min(1.0, max(1e-8, share))
    return (1 - share) * covariance + share * trace / p * torch.eye(p).double()


def change_of_norm(norm, x: Tensor, output: Tensor, kept: Tensor) -> Tensor:
    """In the channels that stay: normalised over them alone, minus as it was."""
    change = torch.zeros_like(output)
    weight = norm.weight[kept]
    if isinstance(norm, nn.RMSNorm):
        z = x[..., kept]
        epsilon = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        alone = z / (z.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight
        change[..., kept] = alone - output[..., kept]
        return change
    bias = norm.bias[kept]
    if isinstance(norm, OwnNorm):
        z = x[..., kept]
        alone = z / (z.abs().mean(-1, keepdim=True) + 0.1) * weight + bias
        change[..., kept] = alone - output[..., kept]
    elif isinstance(norm, nn.LayerNorm):
        alone = nn.functional.layer_norm(x[..., kept], (int(kept.sum()),), weight, bias, norm.eps)
        change[..., kept] = alone - output[..., kept]
    else:
        alone = nn.functional.group_norm(x[:, kept], norm.num_groups, weight, bias, norm.eps)
        change[:, kept] = alone - output[:, kept]
    return change


class Normed(nn.Module):
    """A trunk that a norm over its neurons is on, some of which are far larger than others."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 10)
        self.norm = norm(10)
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 10)
        self.last = norm(10)
        self.head = nn.Linear(10, 4)
        self.stem.weight.data[3] *= 20

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.stem(x)
        trunk = trunk + self.down(self.up(self.norm(trunk)).relu())
        return self.head(self.last(trunk))


class GroupNormed(nn.Module):
    """Maps under group norms of two groups, and an activation between a norm and its consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.middle = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.norm(self.stem(x)).tanh()).tanh().mean((2, 3)))


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        Normed,
        partial(Normed, nn.RMSNorm),
        partial(Normed, partial(nn.RMSNorm, eps=0.3)),
        partial(Normed, OwnNorm),
        GroupNormed,
    ],
)
def test_norms_over_the_neurons_are_measured_where_they_are(make, folds: bool) -> None:
    torch.manual_seed(0)
    shape = (3, 12, 12) if make is GroupNormed else (12,)
    inputs = torch.randn(SAMPLES, *shape).double()
    model = make().double().eval()
    data = [(inputs[:70], None), (inputs[70:], None)]
    assert_measured_as_differentiated(model, data, discover(model, inputs[:2]).groups, folds)


def test_shuffled_data_measures_the_same() -> None:
    model, data, groups = made(cnn)
    inputs = torch.cat([x for x, _ in data])[torch.randperm(SAMPLES)]
    found = []
    for batches in (data, [(part, None) for part in inputs.split(31)]):
        predicted = eliminations(model, batches, groups)
        statistics = consumer_statistics(model, batches, groups)
        found.append((predicted, measured(model, batches, groups, predicted, statistics)))
    for first, second in zip(*found, strict=True):
        for name, elimination in first.items():
            assert second[name].order.equal(elimination.order)
            torch.testing.assert_close(
                second[name].divergence, elimination.divergence, rtol=1e-6, atol=1e-12
            )


@pytest.mark.parametrize("factor", [0.0, 1e-3, 1.0, 1.2, 1e3])
def test_a_prediction_counts_as_far_as_chance_explains_it(factor: float) -> None:
    """D = min(max(predicted, m), m + 2 s), with m = ½ E[e²] and s its standard error."""
    model, data, groups = made(mlp)
    inputs = torch.cat([x for x, _ in data])
    nothing = {
        g.name: Elimination(torch.randperm(g.size), torch.zeros(g.size).double()) for g in groups
    }
    found = measured(model, data, groups, nothing, None, seed=5)
    scores = model(inputs).detach().requires_grad_()
    loss = outputs_of(model, data).drawn_loss(scores, Draws(inputs, 5))
    (drawn,) = torch.autograd.grad(loss, scores)
    predicted = {
        name: replace(nothing[name], divergence=factor * one.divergence)
        for name, one in found.items()
    }
    corrected = measured(model, data, groups, predicted, None, seed=5)
    for group in groups:
        largest = 0.0
        for count in effects._counts(group.size).tolist():
            gone = nothing[group.name].order[:count]
            moved = derivative(model, group, gone, inputs, None)
            squares = (drawn * moved).flatten(1).sum(1).square() / 2
            least = float(squares.mean())
            most = least + 2 * float(squares.std(correction=0)) / SAMPLES**0.5
            foreseen = float(predicted[group.name].divergence[count - 1])
            largest = max(largest, min(max(foreseen, least), most))
            got = float(corrected[group.name].divergence[count - 1])
            assert got == pytest.approx(largest, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("make", [mlp, cnn, Residual])
def test_it_never_falls_and_the_order_stays(make) -> None:
    model, data, groups = made(make)
    found = eliminations(model, data, groups)
    statistics = consumer_statistics(model, data, groups)
    for name, elimination in measured(model, data, groups, found, statistics).items():
        assert torch.equal(elimination.order, found[name].order)
        assert (elimination.divergence >= 0).all()
        assert (elimination.divergence.diff() >= 0).all()


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
