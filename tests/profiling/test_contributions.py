"""Each metric against its definition, sample by sample, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from networks import batches, cnn, hand_weighted, mlp
from nss_prune import profile
from nss_prune.profiling.contributions import protocol
from nss_prune.profiling.contributions.average import Average
from nss_prune.profiling.contributions.protocol import metric_named, register_metric

# What each neuron emits for a sample at a position, [samples and positions, neurons].


def average(emitted: Tensor) -> list[float]:
    return [sum(column) / len(column) for column in emitted.T.tolist()]


def variance(emitted: Tensor) -> list[float]:
    return [
        sum((value - mean) ** 2 for value in column) / len(column)
        for column, mean in zip(emitted.T.tolist(), average(emitted), strict=True)
    ]


def scaled(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / (high - low) for value in values]


def ensemble(emitted: Tensor) -> list[float]:
    pairs = zip(scaled(average(emitted)), scaled(variance(emitted)), strict=True)
    return [first + second for first, second in pairs]


ORACLES = {"avg": average, "var": variance, "ens": ensemble}


@pytest.mark.parametrize("metric", ORACLES)
def test_on_paper(metric: str) -> None:
    model = hand_weighted()
    inputs = torch.tensor([[1.0, 0], [0, 3]] * 8, dtype=torch.float64)
    result = profile(model, [(inputs, torch.zeros(16, dtype=torch.long))], metrics=(metric,))
    # The neurons emit 1, 0, 1, 0 for the first input and 0, 3, 3, 0 for the second.
    expected = {
        "avg": [0.5, 1.5, 2.0, 0.0],
        "var": [0.25, 2.25, 1.0, 0.0],
        "ens": [0.25 + 0.25 / 2.25, 0.75 + 1.0, 1.0 + 1.0 / 2.25, 0.0],
    }
    assert result.contributions[metric]["0"][0].tolist() == pytest.approx(expected[metric])


@pytest.mark.parametrize("metric", ORACLES)
@pytest.mark.parametrize(("make", "shape"), [(mlp, (12,)), (cnn, (3, 12, 12))])
def test_against_loops(metric: str, make, shape) -> None:
    torch.manual_seed(0)
    model = make().eval()
    data = batches(54, shape, 3, size=10)
    result = profile(model, data, metrics=(metric,))
    inputs, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    consumers = [i for i, layer in enumerate(model) if isinstance(layer, (nn.Linear, nn.Conv2d))]
    for layer, consumer in itertools.pairwise(consumers):
        size = result.layers[str(layer)]
        read = model[:consumer](inputs).detach()
        emitted = read.reshape(len(read), size, -1).transpose(1, 2)
        for category in range(3):
            mine = emitted[labels == category].flatten(0, 1)
            assert result.contributions[metric][str(layer)][category].tolist() == pytest.approx(
                ORACLES[metric](mine), abs=1e-12
            )
        assert result.overall[metric][str(layer)].tolist() == pytest.approx(
            ORACLES[metric](emitted.flatten(0, 1)), abs=1e-12
        )


def test_maps_that_differ_within_the_samples_alone_vary() -> None:
    # Every picture has one bright pixel of eight, so that all averages over positions are 1/8.
    pictures = torch.eye(8, dtype=torch.float64).reshape(8, 1, 2, 4)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(24, 2)
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2.0])[:, None, None, None])
    result = profile(model, [(pictures, torch.zeros(8, dtype=torch.long))], metrics=("var",))
    share = 1 / 8 * 7 / 8  # the variance of an indicator
    assert result.overall["var"]["0"].tolist() == pytest.approx([share, 4 * share])


@pytest.mark.parametrize("mean", [0.0, 1e3, -1e4])
@pytest.mark.parametrize("positions", [1, 50])
def test_a_variance_far_from_zero_keeps_its_digits(mean: float, positions: int) -> None:
    metric = metric_named("var")
    activation = torch.randn(40, 3, positions, generator=torch.Generator().manual_seed(0)) + mean
    means = metric.per_sample(metric.gather(activation, None), positions).mean(1)
    by_neuron = activation.double().transpose(0, 1).flatten(1)
    expected = [variance(values[:, None])[0] for values in by_neuron]
    assert metric.score(means[:, None])[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_all_in_one_pass_are_the_same_as_one_by_one() -> None:
    torch.manual_seed(0)
    model, data = cnn(), batches(54, (3, 12, 12), 3, size=10)
    names = ("avg", "var", "ens", "taylor")
    together = profile(model, data, metrics=names)
    assert together.metrics == names
    for metric in names:
        alone = profile(model, data, metrics=(metric,))
        for name in alone.layers:
            torch.testing.assert_close(
                together.contributions[metric][name], alone.contributions[metric][name]
            )
            torch.testing.assert_close(together.curves[metric][name], alone.curves[metric][name])


def test_metrics_without_gradient_work_where_there_is_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*mlp(), nn.Threshold(1e9, 0.0))  # the output is constant

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, inputs: Tensor) -> Tensor:
            outputs = self.body(inputs)
            return outputs if torch.is_grad_enabled() else outputs.detach()

    result = profile(Cut(), batches(48, (12,), 3), metrics=("avg",))
    assert result.contributions["avg"]["body.1"].abs().sum() > 0


def test_a_users_metric_needs_a_class_and_a_name(monkeypatch) -> None:
    monkeypatch.setattr(protocol, "_METRICS", dict(protocol._METRICS))

    class Peak(Average):
        """Largest mean activation, negated, to be unlike every other metric."""

        name = "negated"

        def score(self, means: Tensor) -> Tensor:
            return -means[0]

    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3)
    by_object = profile(model, data, metrics=(Peak(), "avg"))
    assert torch.equal(
        by_object.contributions["negated"]["1"], -by_object.contributions["avg"]["1"]
    )
    register_metric(Peak())
    assert metric_named("negated").name == "negated"
    assert profile(model, data, metrics=("negated",)).metrics == ("negated",)


def test_deeplift_of_the_profile_is_complete_and_streams() -> None:
    torch.manual_seed(0)
    model, data = cnn().eval(), batches(54, (3, 12, 12), 3, size=10)
    inputs, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    for baseline in ("zeros", "mean", torch.full((3, 12, 12), 0.3).double()):
        result = profile(model, data, metrics=("taylor", "deeplift"), baseline=baseline)
        if isinstance(baseline, Tensor):
            reference = baseline[None]
        else:
            reference = inputs.mean(0, keepdim=True) * (baseline == "mean")
        with torch.no_grad():
            change = (model(inputs) - model(reference))[torch.arange(54), labels]
        for category in range(3):
            expected = change[labels == category].mean()
            for name in result.layers:
                total = result.contributions["deeplift"][name][category].sum()
                torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-9)
        alone = profile(model, data, metrics=("taylor",))
        for name in result.layers:
            assert torch.equal(
                result.contributions["taylor"][name], alone.contributions["taylor"][name]
            )


def test_deeplift_says_what_it_does_not_cover() -> None:
    torch.manual_seed(0)
    norm = nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 3)
    ).double()
    result = profile(norm, batches(48, (6,), 3), metrics=("deeplift",))
    assert any("layer_norm" in note for note in result.notes)
    plain = profile(mlp(), batches(48, (12,), 3), metrics=("deeplift",))
    assert plain.notes == ()


def test_deeplift_of_a_regression_explains_the_output() -> None:
    torch.manual_seed(0)
    model = mlp(classes=1)
    inputs = torch.randn(30, 12).double()
    data = [(inputs, torch.randn(30, 1).double())]
    result = profile(
        model,
        data,
        metrics=("deeplift",),
        categories=None,
        loss=lambda outputs, targets: (outputs - targets).square().sum(),
    )
    with torch.no_grad():
        expected = (model(inputs) - model(torch.zeros_like(inputs))).mean()
    torch.testing.assert_close(result.contributions["deeplift"]["1"].sum(), expected)
