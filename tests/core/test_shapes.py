"""Results without values have the shapes and types that torch gives them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nss_prune.core.nested import tensors_in
from nss_prune.core.shapes import RULES, ShapesAlone, called

aten = torch.ops.aten
MAP, TOKENS = (2, 8, 4, 4), (2, 5, 8)
OTHERS: dict[Any, tuple[Any, ...]] = {
    aten.addmm.default: ((3,), (5, 8), (8, 3)),
    aten.native_batch_norm.default: (MAP, (8,), (8,), (8,), (8,), False, 0.1, 1e-5),
    aten.native_layer_norm.default: (TOKENS, [8], (8,), (8,), 1e-5),
    aten._safe_softmax.default: (TOKENS, -1),
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor), (TOKENS, (8,))),
}


def arguments(shapes: tuple[Any, ...], device: str, dtype: torch.dtype) -> list[Any]:
    return [
        torch.ones(shape, device=device, dtype=dtype) if isinstance(shape, tuple) else shape
        for shape in shapes
    ]


def described(result: Any) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.dtype) for tensor in tensors_in(result)]


@pytest.mark.parametrize("function", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_torch_computes_with_values(function: Any, dtype: torch.dtype) -> None:
    shapes = OTHERS.get(function, (MAP,))
    real = function(*arguments(shapes, "cpu", dtype))
    made = called(function, arguments(shapes, "meta", dtype), {})
    assert described(made)[:1] == described(real)[:1]
    assert all(tensor.is_meta for tensor in tensors_in(made))
    assert len(described(made)) == len(described(real))


def test_what_does_not_fit_is_refused_as_ever() -> None:
    bias, rows, columns = (torch.empty(shape, device="meta") for shape in ((3,), (5, 8), (7, 3)))
    with ShapesAlone(), pytest.raises(RuntimeError):
        torch.addmm(bias, rows, columns)


def test_types_that_mix_are_left_to_torch() -> None:
    one, other = torch.empty(3, device="meta"), torch.empty(3, dtype=torch.float64, device="meta")
    assert called(aten.add.Tensor, (one, other), {}).dtype == torch.float64
    assert called(aten.add.Tensor, (one, torch.empty(4, 3, device="meta")), {}).shape == (4, 3)


def test_tensors_with_values_are_computed() -> None:
    with ShapesAlone():
        result: Tensor = torch.ones(2, 3).relu() + torch.ones(3)
    assert torch.equal(result, torch.full((2, 3), 2.0))
