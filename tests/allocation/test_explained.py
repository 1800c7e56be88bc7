"""What channels explain of others, against B = Σ_PS Σ_SS⁻¹ written out for each level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from nss_prune.allocation.elimination import shrunk
from nss_prune.allocation.explained import Explained, by_covariance, by_precision

CHANNELS = 48
Make = Callable[[Tensor, Tensor, Sequence[int]], Explained]


def by_inverse(covariance: Tensor, order: Tensor, gone: Sequence[int]) -> Explained:
    return by_precision(torch.linalg.inv(shrunk(covariance, 30)), order, gone)


def by_factor(covariance: Tensor, order: Tensor, gone: Sequence[int]) -> Explained:
    return by_covariance(covariance, 30, 1000, order, gone)


def by_few_rows(covariance: Tensor, order: Tensor, gone: Sequence[int]) -> Explained:
    return by_covariance(covariance, 30, 6, order, gone)


@pytest.mark.parametrize("make", [by_inverse, by_factor, by_few_rows])
@pytest.mark.parametrize("gone", [(0, 5, 5, 17, 40), (1,), (47,), (48,)])
def test_it_is_the_regression_of_every_level(make: Make, gone: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    covariance = torch.randn(6, CHANNELS, dtype=torch.float64).T.cov()
    order = torch.randperm(CHANNELS)
    values, slope = torch.randn(2, CHANNELS, 9, dtype=torch.float64)
    found = make(covariance, order, gone).effects(values[order], slope[order[: max(gone)]], gone)
    smooth = shrunk(covariance, 30)
    for level, count in zip(found, gone, strict=True):
        p, s = order[:count], order[count:]
        mixing = smooth[p][:, s] @ torch.linalg.inv(smooth[s][:, s])
        expected = (slope[p] * (mixing @ values[s])).sum(0)
        torch.testing.assert_close(level, expected, rtol=1e-5, atol=1e-5)


def test_few_rows_keep_few_values() -> None:
    covariance = torch.randn(6, CHANNELS, dtype=torch.float64).T.cov()
    order = torch.arange(CHANNELS)
    assert by_few_rows(covariance, order, (9,)).values < by_factor(covariance, order, (9,)).values
