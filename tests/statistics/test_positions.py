"""Positions of a map: every axis evenly covered, and sums without a bias."""

from __future__ import annotations

import math

import pytest
import torch

from nss_prune.core.draws import Draws
from nss_prune.statistics.positions import POSITIONS, by_size, positions

SHAPES = [
    (16, 16), (28, 28), (32, 32), (56, 56), (64, 64), (112, 112), (128, 128), (256, 256),
    (7, 300), (300, 7), (96, 128), (1, 1, 80, 120), (197,), (1000,), (4096,), (8, 16, 16),
    (20, 40, 12), (4, 33, 65),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_axis_is_covered_evenly(shape: tuple[int, ...]) -> None:
    """No eighth of an axis has less than half or more than twice its share."""
    for seed in range(5):
        places = torch.stack(torch.unravel_index(positions(shape, seed=seed), shape))
        assert places.shape[1] == POSITIONS
        for axis, size in enumerate(shape):
            if size >= 8:
                counts = torch.bincount(places[axis] * 8 // size, minlength=8)
                assert counts.min() >= 4, (axis, counts)
                assert counts.max() <= 16, (axis, counts)
            if size >= 32:
                assert len(places[axis].unique()) >= 24


@pytest.mark.parametrize("shape", [(8, 8), (64,), (3, 4, 5)])
def test_small_maps_are_looked_at_whole(shape: tuple[int, ...]) -> None:
    assert positions(shape).tolist() == list(range(math.prod(shape)))
    assert positions((50, 50), None).tolist() == list(range(2500))


@pytest.mark.parametrize("shape", [(9, 11), (100,), (4, 5, 6)])
def test_over_many_draws_every_position_is_as_likely(shape: tuple[int, ...]) -> None:
    counts = torch.zeros(math.prod(shape))
    for seed in range(4000):
        counts += torch.bincount(positions(shape, seed=seed), minlength=len(counts))
    expected = 4000 * POSITIONS / len(counts)
    assert ((counts / expected - 1).abs() < 0.12).all()


def test_gradients_sampled_by_size_have_the_second_moment_of_all() -> None:
    torch.manual_seed(0)
    sizes = torch.rand(1, 1, 400).pow(8) * 5
    gradient = (torch.randn(1, 4, 400) * sizes).double()
    full = gradient[0] @ gradient[0].T
    total = torch.zeros(4, 4).double()
    for seed in range(1500):
        (rows,) = by_size(gradient, Draws(torch.randn(1, 3), seed))
        assert rows.shape == (4, POSITIONS)
        assert torch.allclose((rows @ rows.T).trace(), full.trace())
        total += rows @ rows.T
    assert torch.allclose(total / 1500, full, atol=0.02 * float(full.trace()))


def test_few_positions_that_carry_a_gradient_are_all_taken() -> None:
    gradient = torch.zeros(6, 5, 197)
    gradient[:, :, 0] = torch.randn(6, 5)
    gradient[2, :, 100] = torch.randn(5)
    rows = by_size(gradient, Draws(torch.randn(6, 2)))
    assert torch.equal(rows, gradient[:, :, [0, 100]])


def test_one_draw_is_near_the_sums_of_all_on_real_activations() -> None:
    """A convolution's maps of smooth pictures: means and second moments within a tenth."""
    torch.manual_seed(0)
    noise = torch.randn(64, 3, 12, 16)
    pictures = torch.nn.functional.interpolate(noise, (48, 64), mode="bicubic")
    maps = torch.nn.Conv2d(3, 8, 5)(pictures).relu().detach()
    flat = maps.flatten(2).double()
    seen = flat[:, :, positions(maps.shape[2:])]
    for power in (1, 2):
        whole, drawn = flat.pow(power).mean((0, 2)), seen.pow(power).mean((0, 2))
        assert ((drawn / whole - 1).abs() < 0.1).all()
