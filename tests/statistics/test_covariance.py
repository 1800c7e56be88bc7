"""The accumulator of means and covariances against its definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nss_prune.profiling.similarity import Landscape, LandscapeSums
from nss_prune.statistics.covariance import Covariance


def definition(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Σ (x - mean)(x - mean)ᵀ of ``[channels, rows]``, in float64."""
    rows = rows.double()
    mean = rows.sum(1) / rows.shape[1]
    centred = rows - mean[:, None]
    return mean, centred @ centred.T


def stream(mean: float, rows: int = 900, channels: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(channels, channels, generator=generator)
    return mixed @ torch.randn(channels, rows, generator=generator) + mean


def assert_close(found: Covariance, rows: Tensor, relative: float) -> None:
    """Within ``relative`` of the deviations."""
    mean, scatter = definition(rows)
    scale = scatter.diagonal().sqrt()
    deviation = scale / rows.shape[1] ** 0.5
    assert ((found.mean[:, 0] - mean) / deviation).abs().max() < relative
    assert ((found.scatter - scatter) / torch.outer(scale, scale)).abs().max() < relative


@pytest.mark.parametrize("size", [1, 5, 64, 900])
@pytest.mark.parametrize("mean", [0.0, 1e3, -1e4, 1e4 * 3.6])
def test_a_large_mean_costs_no_digits(mean: float, size: int) -> None:
    rows = stream(mean)
    found = Covariance(13)
    for part in rows.split(size, dim=1):
        found.add(part)
    assert found.rows == 900
    assert_close(found, rows, 1e-6)


def test_a_mean_that_moves_costs_no_digits() -> None:
    rows = torch.cat([torch.zeros(13, 100), stream(1e4), stream(-3e3)], dim=1)
    found = Covariance(13)
    for part in rows.split(77, dim=1):
        found.add(part)
    assert_close(found, rows, 1e-6)


def test_float64_is_exact() -> None:
    rows = stream(10.0).double()
    found = Covariance(13)
    for part in rows.split(40, dim=1):
        found.add(part)
    assert_close(found, rows, 1e-13)
    torch.testing.assert_close(found.second_moments, rows @ rows.T, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cut", [0, 3, 450, 900])
def test_shards_with_other_means_are_merged(cut: int) -> None:
    rows = stream(1e4)
    rows[:, :cut] -= 2e4
    shards = [Covariance(13), Covariance(13)]
    for shard, part in zip(shards, rows.split([cut, 900 - cut], dim=1), strict=True):
        shard.add(part)
    both = shards[0] + shards[1]
    assert both.rows == 900
    assert_close(both, rows, 1e-6)
    if cut:
        assert_close(shards[0], rows[:, :cut], 1e-6)  # the shards are as they were


def test_around_the_mean_of_all_shards_scatters_add_up() -> None:
    rows = stream(1e3)
    mean, scatter = definition(rows)
    shards = [Covariance(13), Covariance(13)]
    for shard, part in zip(shards, rows.split([200, 700], dim=1), strict=True):
        shard.add(part)
        shard.move(mean[:, None])
    torch.testing.assert_close(shards[0].scatter + shards[1].scatter, scatter, rtol=1e-5, atol=1e-3)


def test_repeats_have_means_of_their_own() -> None:
    rows = torch.stack([stream(5.0), stream(-7.0).flip(1), stream(100.0) * 2], dim=2)
    found = Covariance(13, repeats=3)
    for part in rows.split(100, dim=1):
        found.add(part)
    each = [definition(rows[:, :, number]) for number in range(3)]
    torch.testing.assert_close(found.mean, torch.stack([mean for mean, _ in each], 1))
    expected = sum(scatter for _, scatter in each)
    torch.testing.assert_close(found.scatter, expected, rtol=1e-5, atol=1e-2)


def test_cleared_it_starts_anew() -> None:
    found = Covariance(13)
    found.add(stream(3.0))
    found.add(stream(9.0)[:, :4])
    found.clear()
    assert found.rows == 0
    assert not found.mean.any()
    assert not found.scatter.any()
    rows = stream(1.0)
    found.add(rows)
    assert_close(found, rows, 1e-6)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("mean", [1.0, 1e3, 1e4])
def test_the_kernel_is_right_whatever_the_mean(mean: float, centered: bool) -> None:
    rows = stream(mean)
    landscape = Landscape(centered=centered)
    sums = LandscapeSums.zeros(13)
    for part in rows.split(50, dim=1):
        sums.add(landscape, [part[:, :, None]])
    moments = definition(rows)[1] if centered else rows.double() @ rows.double().T
    expected = moments.square()
    scale = expected.diagonal().sqrt()
    error = (sums.kernel(landscape) - expected) / torch.outer(scale, scale)
    assert error.abs().max() < 2e-6
