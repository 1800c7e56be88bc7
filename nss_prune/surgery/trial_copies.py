"""Copies of a model that a removal is tried on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from nss_prune.core.models import clone
from nss_prune.surgery.pictures import smaller
from nss_prune.surgery.random_copy import as_dtype, random_copy, random_inputs

MOST_IN_DOUBLE = 2**28  # parameters, which take 2 GiB in float64


class Copy(NamedTuple):
    """A copy of a model to try a removal on.

    Attributes:
        model: The copy.
        inputs: Of its calls.
        given: The inputs that they are drawn like, which the model itself takes.
    """

    model: nn.Module
    inputs: Any
    given: Any


def copies_to_try(model: nn.Module, example_inputs: Any) -> Iterator[Copy]:
    """Copies and inputs, the strictest first; the last is the model as it is."""
    small = smaller(example_inputs)
    size = sum(parameter.numel() for parameter in model.parameters())
    dtypes = [torch.float64, torch.float32] if size <= MOST_IN_DOUBLE else [torch.float32]
    for dtype in (*dtypes, None):
        try:
            copy = random_copy(model, dtype)
        except Exception:  # a device without float64
            continue
        if small is not None:
            yield Copy(copy, random_inputs(small, dtype), small)
        yield Copy(copy, random_inputs(example_inputs, dtype), example_inputs)
        yield Copy(copy, as_dtype(example_inputs, dtype), example_inputs)
    own = clone(model, lambda tensor: tensor.detach())
    yield Copy(own, random_inputs(example_inputs), example_inputs)
    yield Copy(own, example_inputs, example_inputs)


def working_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters, which a removal replaces, and has its own buffers."""
    return clone(
        model,
        lambda tensor: tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone(),
    )
