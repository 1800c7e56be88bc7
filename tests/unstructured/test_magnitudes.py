"""Keys, histogram, band and the largest weights, against sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nss_prune.unstructured import magnitudes as module
from nss_prune.unstructured.magnitudes import SUPPORTED_TYPES, Magnitudes
from reference_unstructured import largest


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even for small tensors."""
    monkeypatch.setattr(module, "_BLOCK", 64)


def spread(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.rand(shape or (23, 11), generator=generator) * 8 - 4
    signs = torch.randint(0, 2, exponents.shape, generator=generator) * 2 - 1
    return (signs * 10**exponents).to(dtype)


def some(shape: torch.Size) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7


@pytest.mark.parametrize("dtype", SUPPORTED_TYPES)
def test_values_invert_keys(dtype):
    weight = spread(dtype)
    magnitudes = Magnitudes(weight, None)
    values = np.concatenate([magnitudes.values(keys) for _, keys in magnitudes.blocks()])
    np.testing.assert_array_equal(values, weight.double().abs().flatten().numpy())


@pytest.mark.parametrize("dtype", SUPPORTED_TYPES)
def test_histogram_counts_every_survivor_once(dtype):
    weight = spread(dtype)
    mask = some(weight.shape)
    bins = Magnitudes(weight, mask).histogram
    assert bins.counts.sum() == mask.sum()
    survivors = weight.double().abs()[mask].numpy()
    read = Magnitudes(weight, mask)
    lowest, highest = read.values(bins.lowest), read.values(bins.highest)
    assert (np.diff(lowest) < 0).all()
    for low, high, count in zip(lowest, highest, bins.counts, strict=True):
        assert count == ((survivors >= low) & (survivors <= high)).sum()


@pytest.mark.parametrize("dtype", SUPPORTED_TYPES)
def test_band_is_what_lies_between(dtype):
    weight = spread(dtype)
    mask = some(weight.shape)
    read = Magnitudes(weight, mask)
    bins = read.histogram
    start, stop = len(bins.counts) // 3, 2 * len(bins.counts) // 3
    band = read.band(int(bins.lowest[stop]), int(bins.highest[start]))
    survivors = np.sort(weight.double().abs()[mask].numpy())[::-1]
    above = survivors[survivors > read.values(bins.highest[start : start + 1])[0]]
    assert band.energy_above == pytest.approx((above**2).sum(), rel=1e-14)
    inside = survivors[len(above) : len(above) + band.counts.sum()]
    np.testing.assert_array_equal(np.repeat(band.magnitudes, band.counts), inside)


@pytest.mark.parametrize("dtype", SUPPORTED_TYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_largest_agrees_with_sorting(dtype, masked):
    weight = spread(dtype, 9, 5, 3)
    mask = some(weight.shape) if masked else torch.ones_like(weight, dtype=torch.bool)
    read = Magnitudes(weight, mask if masked else None)
    for count in (0, 1, 17, read.remaining - 1, read.remaining):
        assert torch.equal(read.largest(count), largest(weight, mask, count))


def test_ties_go_by_position_across_blocks():
    weight = torch.tensor([1.0, -2.0] * 100).view(20, 10)
    kept = Magnitudes(weight, None).largest(130)
    expected = torch.arange(200) % 2 == 1
    expected[torch.arange(0, 60, 2)] = True
    assert torch.equal(kept.flatten(), expected)


def test_zeros_of_either_sign_are_survivors_like_others():
    weight = torch.tensor([[0.0, -0.0, 0.0, 1e-45]])
    mask = torch.tensor([[False, True, True, True]])
    read = Magnitudes(weight, mask)
    assert read.remaining == 3
    assert read.nonzero == 1
    assert read.largest(2).tolist() == [[False, True, False, True]]


def test_memory_layout_does_not_matter():
    weight = spread(torch.float32, 8, 6, 5, 4)
    moved = weight.to(memory_format=torch.channels_last)
    kept = Magnitudes(moved, None).largest(300)
    assert torch.equal(kept, Magnitudes(weight, None).largest(300))
    assert kept.stride() == moved.stride()


def test_blocks_hold_whole_groups_of_rows():
    read = Magnitudes(spread(torch.float32, 22, 7), None)
    sizes = [len(keys) for _, keys in read.blocks(rows_together=4)]
    assert sum(sizes) == 22 * 7
    assert all(size % (4 * 7) == 0 for size in sizes[:-1])
