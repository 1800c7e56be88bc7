"""Strategies and budgets from one profile, without another pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import batches, cnn, mlp
from nss_prune import PAPER, Profile, profile
from nss_prune.errors import ArgumentError
from reference import algorithm_1, landscape_similarity


@pytest.fixture(scope="module")
def known() -> Profile:
    torch.manual_seed(0)
    return profile(mlp(), batches(48, (12,), 3), metrics=("taylor", "avg"))


def best(scores: torch.Tensor, count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda n: -float(scores[n]))[:count])


@pytest.mark.parametrize("metric", ["taylor", "avg"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 1.0])
def test_category_is_the_union_of_the_best_of_each(known, metric: str, ratio: float) -> None:
    kept = known.slice(ratio=ratio, strategy="category", metric=metric).kept
    for name, size in known.layers.items():
        expected = set()
        for scores in known.contributions[metric][name]:
            expected |= best(scores, max(1, round(ratio * size)))
        assert set(kept[name].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.5, 1.0])
def test_global_is_the_best_over_all_data(known, ratio: float) -> None:
    kept = known.slice(ratio=ratio, strategy="global").kept
    for name, size in known.layers.items():
        expected = best(known.overall["taylor"][name], max(1, round(ratio * size)))
        assert set(kept[name].nonzero().flatten().tolist()) == expected


def test_semantic_ratio_keeps_what_enters_first(known) -> None:
    kept = known.slice(ratio=0.5).kept
    for name, size in known.layers.items():
        entry = known.thresholds["taylor"][name].min(0).values
        assert int(kept[name].sum()) == round(0.5 * size)
        assert entry[kept[name]].max() <= entry[~kept[name]].min()


def test_interval_may_change_without_another_pass(known) -> None:
    torch.manual_seed(0)
    again = profile(mlp(), batches(48, (12,), 3), interval=5)
    for theta in (0.8, 0.95):
        first, second = known.slice(theta, interval=5).kept, again.slice(theta).kept
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"theta": 0.9, "ratio": 0.5}, "ratio"),
        ({"theta": 0.9, "strategy": "category"}, "ratio"),
        ({"ratio": 0.0, "strategy": "global"}, "ratio"),
        ({"ratio": 1.5}, "ratio"),
        ({"strategy": "best"}, "semantic"),
        ({"interval": 0}, "at least 1"),
    ],
)
def test_what_does_not_suit_the_strategy_is_refused(known, arguments, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        known.slice(**arguments)


def activations(model: nn.Sequential, consumer: int, inputs: torch.Tensor, size: int):
    read = model[:consumer](inputs).detach()
    return read.reshape(len(read), size, -1)


@pytest.mark.parametrize("positions", [None, 5])
def test_pooled_and_pixel_landscapes(positions: int | None) -> None:
    torch.manual_seed(0)
    model, data = cnn().eval(), batches(40, (3, 12, 12), 2, size=40)
    (inputs, labels), mine = data[0], data[0][1] == 0
    for features in ("pooled", "pixel"):
        result = profile(model, data, features=features, positions=positions)
        for layer, consumer, size in ((0, 4, 8), (4, 7, 10)):
            read = activations(model, consumer, inputs[mine], size)
            if features == "pooled":
                rows = read.mean(2)
            else:
                if positions is not None:
                    each = read.shape[2] / positions
                    middle = [int((i + 0.5) * each) for i in range(positions)]
                    read = read[:, :, middle]
                rows = read.transpose(1, 2).reshape(-1, size)
            entry = result.thresholds["taylor"][str(layer)][0]
            for theta in (0.8, 0.95):
                expected = algorithm_1(rows, result.contributions["taylor"][str(layer)][0], theta)
                assert set((entry < theta).nonzero().flatten().tolist()) == expected
    assert labels.bincount().tolist() == [20, 20]


@pytest.mark.parametrize("centered", [True, False])
def test_flat_landscape_is_equation_1(centered: bool) -> None:
    torch.manual_seed(0)
    model, data = cnn().eval(), batches(40, (3, 12, 12), 2, size=40)
    inputs, labels = data[0]
    arguments = {"features": "flat", "centered": True} if centered else PAPER
    result = profile(model, data, **arguments)
    read = activations(model, 4, inputs[labels == 1], 8)
    if centered:
        read = read - read.mean(0)
    order = result.ranking("taylor", "0")[1]
    for k in range(1, 9):
        subset, whole = read[:, order[:k]].flatten(1), read.flatten(1)
        expected = landscape_similarity(subset, whole)
        assert float(result.curves["taylor"]["0"][1][k - 1]) == pytest.approx(expected, abs=1e-12)
