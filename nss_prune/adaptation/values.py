"""The values of a model's parameters and buffers: copied, and put back when something fails."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


@torch.no_grad()
def put_back(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the model the values of :func:`copied`, from any device."""
    for name, tensor in tensors_of(model).items():
        tensor.data.copy_(values[name])


@contextlib.contextmanager
def undone_on_failure(
    model: nn.Module, optimizer: Optimizer | None = None
) -> Iterator[dict[str, Tensor]]:
    """Put model and optimiser back as they were when the body raises.

    Yields:
        The values that the model has on entry.
    """
    before = copied(model)
    state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())
    try:
        yield before
    except BaseException:
        put_back(model, before)
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(state)
            optimizer.zero_grad()
        raise
