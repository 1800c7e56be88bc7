"""The neurons that training reduces the loss by most a parameter, against naive loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_readapt import SGD, network, stripes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from networks import assert_unchanged, fingerprint, mlp
from nss_prune.adaptation.attacks import FGSM
from nss_prune.adaptation.freezing import critical_entries
from nss_prune.adaptation.readapt import ReadaptTrainer
from nss_prune.adaptation.sensitivity import sensitive_slice, sensitivities
from nss_prune.errors import ArgumentError, DataError

Batch = tuple[Tensor, Tensor]


def samples(count: int = 30) -> list[Batch]:
    """Batches of 12, and one of what is left."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 12, dtype=torch.float64, generator=generator)
    labels = torch.arange(count) % 3
    return list(zip(inputs.split(12), labels.split(12), strict=True))


def loss_of(model: nn.Module):
    def loss(batch: Batch, number: int) -> tuple[Tensor, int]:
        inputs, labels = batch
        return cross_entropy(model(inputs), labels), len(labels)

    return loss


def chosen(model: nn.Module, budget: float) -> Any:
    return sensitive_slice(model, samples()[0][0], samples(), loss_of(model), budget)


def squared_differences(model: nn.Sequential) -> dict[str, Tensor]:
    """(dL/dw)² of every entry, by central differences of the mean loss over all samples."""
    inputs, labels = (torch.cat(parts) for parts in zip(*samples(), strict=True))

    def mean_loss() -> float:
        total = 0.0
        with torch.no_grad():
            for sample, label in zip(model(inputs), labels.tolist(), strict=True):
                total += float(sample.exp().sum().log() - sample[label])
        return total / len(labels)

    found = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().view(-1)
        slopes = torch.zeros_like(values)
        for i in range(len(values)):
            old = float(values[i])
            values[i] = old + 1e-5
            above = mean_loss()
            values[i] = old - 1e-5
            slopes[i] = (above - mean_loss()) / 2e-5
            values[i] = old
        found[name] = slopes.square().view(parameter.shape)
    return found


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(hidden=(6, 5))


def test_a_sensitivity_is_the_squared_slope_of_the_loss_over_all_samples(model) -> None:
    before = fingerprint(model)
    found = sensitivities(model, samples(), loss_of(model))
    assert_unchanged(model, before)
    for name, wanted in squared_differences(model).items():
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 1.0])
def test_neurons_of_the_largest_mean_fill_the_budget(model: nn.Sequential, budget: float) -> None:
    squares = squared_differences(model)
    widths, total = (12, 6, 5, 3), sum(p.numel() for p in model.parameters())
    means = []  # (mean of g² over row, bias and column, layer, neuron)
    for layer, (first, second) in enumerate([("1", "3"), ("3", "5")]):
        for neuron in range(widths[layer + 1]):
            entries = [
                *squares[f"{first}.weight"][neuron].tolist(),
                float(squares[f"{first}.bias"][neuron]),
                *squares[f"{second}.weight"][:, neuron].tolist(),
            ]
            means.append((sum(entries) / len(entries), layer, neuron))
    means.sort(reverse=True)
    best = [next(one for one in means if one[1] == layer) for layer in (0, 1)]
    ranked = [*best, *[one for one in means if one not in best]]

    def left(kept: list[tuple[float, int, int]]) -> int:
        first, second = (sum(one[1] == layer for one in kept) for layer in (0, 1))
        return 12 * first + first + first * second + second + second * 3 + 3

    wanted = [ranked[:count] for count in range(2, 12) if left(ranked[:count]) <= budget * total][
        -1
    ]
    found = chosen(model, budget)
    for layer, (name, kept) in enumerate(found.kept.items()):
        assert name == ("1", "3")[layer]
        neurons = sorted(neuron for _, where, neuron in wanted if where == layer)
        assert kept.nonzero().flatten().tolist() == neurons
    assert 1 - found.compression_rate(model) == pytest.approx(left(wanted) / total)


def test_a_larger_budget_has_the_neurons_of_a_smaller_one(model: nn.Sequential) -> None:
    small, large = (chosen(model, budget).kept for budget in (0.4, 0.7))
    for name, kept in small.items():
        assert not (kept & ~large[name]).any()
    assert all(torch.equal(kept, small[name]) for name, kept in chosen(model, 0.4).kept.items())


def test_a_step_of_the_chosen_neurons_reduces_the_loss_more_than_one_of_the_others(model) -> None:
    """Of as many parameters: the neurons of the least sensitivity are the other half."""
    inputs, labels = (torch.cat(parts) for parts in zip(*samples(), strict=True))
    found = chosen(model, 0.5)
    others = copy.deepcopy(found)
    for kept in others.kept.values():
        kept.copy_(torch.roll(kept, 1))
    gains = []
    for critical in (found, others):
        moved = copy.deepcopy(model)
        cross_entropy(moved(inputs), labels).backward()
        with torch.no_grad():
            before = cross_entropy(moved(inputs), labels)
            for name, entries in critical_entries(critical, moved).items():
                value = moved.get_parameter(name)
                value -= 1e-3 * value.grad * entries
            gains.append(float(before - cross_entropy(moved(inputs), labels)))
    assert gains[0] > gains[1] > 0


def test_the_trainer_chooses_by_the_loss_of_samples_and_adversaries() -> None:
    model, attack = network(), FGSM(0.1)
    before = copy.deepcopy(model).eval()
    trainer = ReadaptTrainer(model, attack=attack, adversaries="fixed", params_budget=0.5)
    with pytest.raises(ArgumentError, match="call fit"):
        _ = trainer.freezing
    result = trainer.fit(stripes(), epochs=2, **SGD)

    def both(batch: Batch, number: int) -> tuple[Tensor, int]:
        inputs, labels = batch
        moved = attack(before, inputs, labels)
        loss = cross_entropy(before(inputs), labels) + cross_entropy(before(moved), labels)
        return loss, len(labels)

    wanted = sensitive_slice(before, stripes()[0][0], stripes(), both, 0.5)
    assert all(torch.equal(wanted.kept[name], kept) for name, kept in trainer.slice.kept.items())
    assert 0.3 < result.tpr <= 0.5
    assert result.tpr == trainer.freezing.share
    assert result.losses[-1] < result.losses[0]
    for name, entries in critical_entries(wanted, model).items():
        now, then = model.get_parameter(name), before.get_parameter(name)
        assert torch.equal(now[~entries], then[~entries])


def test_a_training_with_random_adversaries_resumes(tmp_path) -> None:
    """What was chosen does not depend on the random numbers at the time."""
    first, second = network(), network()
    how = {"attack": "pgd", "epsilon": 0.1, "params_budget": 0.5}
    ReadaptTrainer(first, **how).fit(stripes(), epochs=1, checkpoint=tmp_path / "c", **SGD)
    torch.manual_seed(7)
    trainer = ReadaptTrainer(second, **how)
    trainer.fit(stripes(), epochs=2, checkpoint=tmp_path / "c", resume=True, **SGD)
    assert len(trainer.result.losses) == 2


@pytest.mark.parametrize("budget", [0, -0.1, 1.5, float("nan")])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(ArgumentError, match="params_budget is"):
        ReadaptTrainer(network(), params_budget=budget)


def test_what_cannot_be_chosen_is_said(model: nn.Sequential) -> None:
    with pytest.raises(ArgumentError, match="one neuron of each layer leaves"):
        chosen(model, 0.05)
    with pytest.raises(DataError, match="no batch"):
        sensitivities(model, [], loss_of(model))
    critical = chosen(model, 0.5)
    for given in ({"slice": critical}, {"train": "all"}):
        with pytest.raises(ArgumentError, match="without slice and train"):
            ReadaptTrainer(model, params_budget=0.5, **given)
