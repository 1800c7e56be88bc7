"""What is drawn for a sample: independent and even, and the same in any batch."""

from __future__ import annotations

import pytest
import torch

from nss_prune.core.draws import Draws


def test_a_sample_draws_the_same_in_any_batch_and_place() -> None:
    inputs = torch.randn(50, 3, 4)
    order = torch.randperm(50)
    together, shuffled = Draws(inputs, 7), Draws(inputs[order], 7)
    like = torch.zeros(50, 2, 9)
    assert torch.equal(together.signs(like)[order], shuffled.signs(like))
    assert torch.equal(together.uniform()[order], shuffled.uniform())
    assert torch.equal(together.uniform()[:1], Draws(inputs[:1], 7).uniform())


@pytest.mark.parametrize(
    "inputs",
    [
        torch.arange(4000)[:, None].float(),
        torch.arange(4000)[:, None],
        torch.eye(64, dtype=torch.bfloat16).repeat(63, 1)[:4000] * torch.rand(4000, 1).bfloat16(),
        {
            "a": torch.arange(4000.0, dtype=torch.float64),
            "b": torch.zeros(4000, 2, dtype=torch.bool),
        },
    ],
)
def test_signs_are_even_and_independent(inputs) -> None:
    draws = Draws(inputs)
    signs = draws.signs(torch.zeros(4000, 6, dtype=torch.float64))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    means = signs.mean(0)
    distinct = len(draws.keys.unique())
    assert means.abs().max() < 5 / distinct**0.5
    products = (signs.T @ signs / 4000).fill_diagonal_(0)
    assert products.abs().max() < 5 / distinct**0.5
    other = draws.signs(torch.zeros(4000, 6, dtype=torch.float64), stream=1)
    assert (signs * other).mean(0).abs().max() < 5 / distinct**0.5


def test_uniform_numbers_are_uniform() -> None:
    drawn = Draws(torch.randn(20000, 2)).uniform()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn.float(), 20, 0, 1)
    assert (counts - 1000).abs().max() < 5 * 1000**0.5
