"""The streaming pass against sample-by-sample oracles."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from networks import batches, cnn, hand_weighted, mlp
from nss_prune import profile
from nss_prune.errors import ArgumentError
from nss_prune.profiling.categories import joined
from nss_prune.profiling.similarity import ranked
from reference import algorithm_1, taylor


def whole(data: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def test_hand_weighted_taylor_on_paper() -> None:
    model = hand_weighted()
    inputs = torch.tensor([[1.0, 0], [0, 1]] * 8, dtype=torch.float64)
    labels = torch.zeros(16, dtype=torch.long)
    result = profile(model, [(inputs, labels)])
    # Logits are (3, 0) and (2, 1): with L = CE and p1 the probability of class 1,
    # a·∂L/∂a is u·(-p1), v·p1, (u + v)·(-2 p1) and 0.
    first, second = 1 / (1 + torch.e**3), 1 / (1 + torch.e**1)
    expected = [first**2 / 2, second**2 / 2, 2 * first**2 + 2 * second**2, 0.0]
    assert result.contributions["taylor"]["0"][0].tolist() == pytest.approx(expected, abs=1e-12)


def test_hand_weighted_slice_on_paper() -> None:
    # Centred, u and v are exactly opposed and u + v is constant. Neuron 2, the largest
    # contribution, has similarity 0; adding v, the next, explains the layer completely.
    model = hand_weighted()
    inputs = torch.tensor([[1.0, 0], [0, 1]] * 8, dtype=torch.float64)
    result = profile(model, [(inputs, torch.zeros(16, dtype=torch.long))])
    assert result.curves["taylor"]["0"][0].tolist() == pytest.approx([0, 1, 1, 1])
    assert result.slice(0.95).kept["0"].tolist() == [False, True, True, False]


@pytest.mark.parametrize(("make", "shape"), [(mlp, (12,)), (cnn, (3, 12, 12))])
@pytest.mark.parametrize("interval", [1, 8])
def test_slices_are_algorithm_1_category_by_category(make, shape, interval: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    data = batches(54, shape, 3, size=10)
    result = profile(model, data, interval=interval)
    inputs, labels = whole(data)
    consumers = [
        index for index, layer in enumerate(model) if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    for layer, consumer in itertools.pairwise(consumers):
        name, size = str(layer), result.layers[str(layer)]
        union: set[int] = set()
        for category in range(3):
            mine = labels == category
            read = model[:consumer](inputs[mine]).detach()
            contribution = taylor(model, consumer, inputs[mine], labels[mine])
            if isinstance(model[layer], nn.Conv2d) and isinstance(model[consumer], nn.Linear):
                read = read.reshape(len(read), size, -1)
                # A flattened map: the positions of a channel belong to one neuron.
                contribution = flattened_taylor(model, consumer, inputs[mine], labels[mine], size)
            rows = read.reshape(len(read), size, -1).transpose(1, 2).reshape(-1, size)
            torch.testing.assert_close(
                result.contributions["taylor"][name][category], contribution, rtol=1e-10, atol=0
            )
            entry = result.thresholds["taylor"][name][category]
            for theta in (0.8, 0.9, 0.95):
                expected = algorithm_1(rows, contribution, theta, interval)
                assert set((entry < theta).nonzero().flatten().tolist()) == expected
            union |= algorithm_1(rows, contribution, 0.9, interval)
        kept = result.slice(0.9).kept[name]
        assert set(kept.nonzero().flatten().tolist()) == union


def flattened_taylor(model, consumer: int, inputs, labels, size: int) -> torch.Tensor:
    squares = []
    for sample, label in zip(inputs, labels, strict=True):
        activation = model[:consumer](sample[None]).detach().requires_grad_()
        loss = nn.functional.cross_entropy(model[consumer:](activation), label[None])
        (gradient,) = torch.autograd.grad(loss, activation)
        squares.append((activation * gradient).reshape(size, -1).sum(1) ** 2)
    return torch.stack(squares).mean(0).detach()


def test_batches_do_not_matter_and_neither_does_duplicated_data() -> None:
    torch.manual_seed(0)
    model = mlp()
    small, large = batches(48, (12,), 3, size=5), batches(48, (12,), 3, size=48)
    first, second = profile(model, small), profile(model, large)
    twice = profile(model, large + large)
    for other in (second, twice):
        for name in first.layers:
            torch.testing.assert_close(
                first.contributions["taylor"][name], other.contributions["taylor"][name]
            )
            torch.testing.assert_close(first.curves["taylor"][name], other.curves["taylor"][name])


def test_permuted_neurons_give_the_permuted_slice() -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3)
    before = profile(model, data).slice(0.9).kept["1"]
    order = torch.randperm(16)
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight[order])
        model[1].bias.copy_(model[1].bias[order])
        model[3].weight.copy_(model[3].weight[:, order])
    assert torch.equal(profile(model, data).slice(0.9).kept["1"], before[order])


def test_a_larger_theta_keeps_more() -> None:
    torch.manual_seed(0)
    result = profile(mlp(), batches(48, (12,), 3))
    slices = [result.slice(theta).kept for theta in (0.5, 0.8, 0.9, 0.99, 1.0)]
    for smaller, larger in itertools.pairwise(slices):
        assert all((smaller[name] <= larger[name]).all() for name in smaller)


def test_categories_by_prediction_none_and_function() -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(60, (12,), 3)
    inputs, _ = whole(data)
    assert profile(model, data, categories=None).categories == ((0,),)
    predicted = profile(model, data, categories="predicted")
    counts = model(inputs).argmax(1).unique(return_counts=True)[1]
    assert sum(predicted.samples) == int(counts.sum()) == 60
    halves = profile(model, data, categories=lambda x, y, outputs: (y > 0).long())
    assert halves.categories == ((0,), (1,))
    assert halves.samples == (20, 40)


def test_small_categories_join_and_the_notes_say_so() -> None:
    assert joined({0: 9, 1: 3, 2: 20, 3: 6}) == {0: (0,), 1: (1, 3), 2: (2,)}
    assert joined({0: 9, 1: 3, 2: 20}) == {0: (0, 1), 2: (2,)}
    assert joined({0: 2, 5: 3}) == {0: (0, 5)}
    torch.manual_seed(0)
    model = mlp()
    inputs = torch.randn(30, 12, dtype=torch.float64)
    labels = torch.tensor([0] * 14 + [1] * 14 + [2] * 2)
    result = profile(model, [(inputs, labels)])
    assert result.categories == ((0, 2), (1,)) or result.categories == ((0,), (1, 2))
    assert "count as one" in result.notes[0]


def test_model_and_gradients_are_left_as_found() -> None:
    torch.manual_seed(0)
    model = mlp().train()
    model[1].weight.requires_grad_(False)
    profile(model, batches(48, (12,), 3))
    assert model.training
    assert not model[1].weight.requires_grad
    assert model[3].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_unknown_choices_are_named() -> None:
    model, data = mlp(), batches(48, (12,), 3)
    with pytest.raises(ArgumentError, match="taylor"):
        profile(model, data, metrics=("magnitude",))
    with pytest.raises(ArgumentError, match="pixel"):
        profile(model, data, features="voxel")
    with pytest.raises(ArgumentError, match="predicted"):
        profile(model, data, categories="label")
    with pytest.raises(ArgumentError, match="not profiled"):
        profile(model, data).slice(0.9, metric="avg")


def test_ranks_are_by_magnitude() -> None:
    contributions = torch.tensor([[0.5, -3.0, 0.0, 2.0], [1.0, -1.0, 2.0, 0.0]])
    assert ranked(contributions).tolist() == [[1, 3, 0, 2], [2, 0, 1, 3]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_changes_nothing(mode: Any) -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3)
    expected = profile(model, data, metrics=("taylor",)).slice(0.8)
    with mode():
        found = profile(model, data, metrics=("taylor",)).slice(0.8)
    assert all(torch.equal(found.kept[name], kept) for name, kept in expected.kept.items())
