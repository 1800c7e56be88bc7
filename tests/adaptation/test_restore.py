"""Frozen entries come back to the bit, one tensor at a time or all together."""

from __future__ import annotations

import pytest
import torch

from nss_prune.adaptation.restore import FrozenEntries, FusedEntries, bits_of, fused


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    matrix = torch.randn(6, 5).t()  # its columns lie in memory one after the other
    pictures = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    found = [torch.randn(7), matrix, pictures, torch.randn(2, 1, 3), torch.tensor(1.5)]
    found = [tensor.to(dtype) for tensor in found]
    found[0][:3] = torch.tensor([-0.0, torch.nan, torch.inf])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("all_together", [False, True])
def test_frozen_bits_come_back_and_others_stay(dtype: torch.dtype, all_together: bool) -> None:
    values = tensors(dtype)
    frozen = [torch.rand(value.shape) < 0.5 for value in values]
    frozen[0][:4] = torch.tensor([True, True, True, False])
    before = [bits_of(value).clone() for value in values]
    kept = [FrozenEntries(value, mask) for value, mask in zip(values, frozen, strict=True)]
    restorable = [FusedEntries(kept)] if all_together else kept
    for value in values:
        value.fill_(torch.nan)
    written = [bits_of(value).clone() for value in values]
    for one in restorable:
        one.restore()
    for value, mask, old, new in zip(values, frozen, before, written, strict=True):
        assert torch.equal(bits_of(value), torch.where(mask, old, new))


def test_on_a_cpu_each_tensor_is_restored_alone() -> None:
    kept = [
        FrozenEntries(value, torch.ones_like(value, dtype=torch.bool))
        for value in tensors(torch.float32)
    ]
    assert fused(kept) == kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_dense_tensors_are_restored_together() -> None:
    values = [value.cuda() for value in [*tensors(torch.float32), *tensors(torch.float64)]]
    values.append(torch.randn(6, 6, device="cuda")[:, ::2])
    kept = [FrozenEntries(value, torch.ones_like(value, dtype=torch.bool)) for value in values]
    found = fused(kept)
    assert sum(isinstance(one, FusedEntries) for one in found) == 2
    assert sum(isinstance(one, FrozenEntries) for one in found) == 1
