"""The one-pass curve against Algorithm 1 written as loops, in float64."""

from __future__ import annotations

import pytest
import torch

from nss_prune.errors import ArgumentError
from nss_prune.profiling.similarity import (
    Landscape,
    LandscapeSums,
    entry_thresholds,
    similarity_curve,
)
from reference import algorithm_1, landscape_similarity


def kernel_of(activations: torch.Tensor, landscape: Landscape | None = None) -> torch.Tensor:
    """K of activations [samples, neurons]."""
    landscape = landscape or Landscape()
    sums = LandscapeSums.zeros(activations.shape[1])
    sums.add(landscape, [landscape.observations(activations[:, :, None])])
    return sums.kernel(landscape)


@pytest.fixture
def activations() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(60, 6, generator=generator, dtype=torch.float64)
    weights = torch.randn(6, 23, generator=generator, dtype=torch.float64)
    return (mixed @ weights).relu() + 0.3


def test_curve_is_the_similarity_of_every_prefix(activations: torch.Tensor) -> None:
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    curve = similarity_curve(kernel_of(activations), order)
    centred = activations - activations.mean(0)
    for k in range(23):
        expected = landscape_similarity(centred[:, order[: k + 1]], centred)
        assert curve[k].item() == pytest.approx(expected, abs=1e-13)


def test_uncentred_kernel_is_the_papers_equation(activations: torch.Tensor) -> None:
    curve = similarity_curve(kernel_of(activations, Landscape(centered=False)), torch.arange(23))
    expected = landscape_similarity(activations[:, :5], activations)
    assert curve[4].item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("interval", [1, 3, 8, 23, 40])
@pytest.mark.parametrize("seed", range(4))
def test_thresholds_give_the_sets_of_algorithm_1(
    activations: torch.Tensor, interval: int, seed: int
) -> None:
    contributions = torch.rand(23, generator=torch.Generator().manual_seed(seed))
    order = contributions.argsort(descending=True)
    curve = similarity_curve(kernel_of(activations), order)
    entry = entry_thresholds(curve, order, interval)
    for theta in (0.2, 0.5, 0.8, 0.9, 0.95, 0.99):
        expected = algorithm_1(activations, contributions, theta, interval)
        assert set((entry < theta).nonzero().flatten().tolist()) == expected


def test_curve_that_falls_still_stops_where_algorithm_1_stops() -> None:
    curve = torch.tensor([0.3, 0.9, 0.6, 0.95, 1.0], dtype=torch.float64)
    entry = entry_thresholds(curve, torch.arange(5))
    assert entry.tolist() == [0.0, 0.3, 0.9, 0.9, 0.95]


def test_dead_layer_is_represented_by_its_first_neuron() -> None:
    curve = similarity_curve(torch.zeros(4, 4, dtype=torch.float64), torch.arange(4))
    entry = entry_thresholds(curve, torch.arange(4))
    assert (entry < 1.0).tolist() == [True, False, False, False]


def test_interval_below_one_is_refused() -> None:
    with pytest.raises(ArgumentError, match="at least 1"):
        entry_thresholds(torch.ones(3), torch.arange(3), 0)
