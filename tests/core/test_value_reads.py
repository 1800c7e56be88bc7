"""Whether a call depends on the values of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nss_prune.core.value_reads import ValueReads


@pytest.mark.parametrize(
    ("function", "reads"),
    [
        (lambda x: x if bool(x.sum() > 0) else -x, True),
        (lambda x: x[x > 0], True),
        (lambda x: x * float(x.max()), True),
        (lambda x: x.nonzero(), True),
        (lambda x: x[: x.shape[0] // 2].relu() @ x[:2], False),
        (lambda x: torch.where(x > 0, x, -x).softmax(-1), False),
    ],
)
def test_what_tells_of_values_is_found(function: Callable[[Tensor], Any], reads: bool) -> None:
    inputs = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    expected = function(inputs)
    with ValueReads() as found:
        made = function(inputs)
    assert found.found is reads
    assert torch.equal(made, expected)
