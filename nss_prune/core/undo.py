"""Put a model back as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nss_prune.errors import NSSPruneError, RemovalError


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, every module gets back the very tensors and attributes it had.

    Tensors are not copied: a removal replaces them and leaves the old ones as they are.
    """
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    except BaseException as error:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents:
                container.clear()
                container.update(content)
        if isinstance(error, NSSPruneError) or not isinstance(error, Exception):
            raise
        raise RemovalError(
            f"the removal failed: {type(error).__name__}: {error}; the model was put back"
        ) from error


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The dicts and sets of a module with what they hold.

    They are refilled and not replaced, because the handles of hooks refer to the dicts.
    """
    return [
        (value, value.copy()) for value in vars(module).values() if isinstance(value, (dict, set))
    ]


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
