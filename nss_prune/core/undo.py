"""Put a model back as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nss_prune.core.afterwards import afterwards, completed
from nss_prune.errors import NSSPruneError, RemovalError


class Snapshot:
    """A model as it is now: the very tensors, children, hooks, attributes and class of each module.

    Args:
        model: Any module.
        values: Copy the values of the tensors too, for a change that writes to them. One that
            replaces them, as a removal does, needs no copies.
        optimizer: Of the model; its state is copied.

    Attributes:
        values: The copies by name; empty without ``values``.
    """

    def __init__(
        self, model: nn.Module, *, values: bool = False, optimizer: Optimizer | None = None
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.values = copied(model) if values else {}
        self._modules = [(m, type(m), dict(vars(m)), _contents(m)) for m in model.modules()]
        self._state = None if optimizer is None else copy.deepcopy(optimizer.state_dict())

    def restore(self) -> None:
        """Put the model back, and the optimiser, whose gradients are cleared."""
        completed(self._put_back)

    def _put_back(self) -> None:
        for module, kind, attributes, contents in self._modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents:
                container.clear()
                container.update(content)
        if self.values:
            put_back(self.model, self.values)
        if self.optimizer is not None and self._state is not None:
            self.optimizer.load_state_dict(self._state)
            self.optimizer.zero_grad()


class _Attributes:
    """The attributes of an object as they are now, with what lists, dicts and sets among them hold.

    Args:
        owner: Any object; None has no attributes.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._before = {} if owner is None else dict(vars(owner))
        self._contents = [
            (value, value.copy())
            for value in self._before.values()
            if isinstance(value, (dict, list, set))
        ]

    def restore(self) -> None:
        if self._owner is None:
            return
        vars(self._owner).clear()
        vars(self._owner).update(self._before)
        for container, content in self._contents:
            container.clear()
            put = container.extend if isinstance(container, list) else container.update
            put(content)


@contextlib.contextmanager
def restored_on_error(
    model: nn.Module,
    *,
    values: bool = False,
    optimizer: Optimizer | None = None,
    owner: Any = None,
) -> Iterator[dict[str, Tensor]]:
    """If the body raises, the model is put back as it was, and the error goes on.

    Args:
        model, values, optimizer: As :class:`Snapshot` takes them.
        owner: What works on the model, such as a trainer; it gets its attributes back too.

    Yields:
        The values on entry by name; empty without ``values``.
    """
    before = Snapshot(model, values=values, optimizer=optimizer)
    attributes = _Attributes(owner)
    try:
        yield before.values
    except BaseException:
        before.restore()
        completed(attributes.restore)
        raise


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """A removal as a whole or not at all: :func:`restored_on_error` of one that replaces tensors.

    Raises:
        RemovalError: In place of what the body raises, unless that is an error of this library or
            no Exception.
    """
    try:
        with restored_on_error(model):
            yield
    except NSSPruneError:
        raise
    except Exception as error:
        raise RemovalError(
            f"the removal failed: {type(error).__name__}: {error}; the model was put back"
        ) from error


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """After the context, buffers and attributes that calls of the model change are as before."""
    before = Snapshot(model)
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    lists = [
        (value, list(value))
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, list)
    ]

    def restore() -> None:
        before.restore()
        for value, items in lists:
            value[:] = items
        with torch.no_grad():
            for buffer, content in buffers:
                if not buffer.is_meta and not torch.equal(buffer, content):
                    buffer.data.copy_(content)

    with afterwards(restore):
        yield


@contextlib.contextmanager
def values_restored(model: nn.Module) -> Iterator[None]:
    """Within the context parameters and buffers may be overwritten; then they are as before."""
    before = copied(model)
    with afterwards(lambda: put_back(model, before)):
        yield


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


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The dicts and sets of a module with what they hold.

    They are refilled and not replaced, because the handles of hooks refer to the dicts.
    """
    return [
        (value, value.copy()) for value in vars(module).values() if isinstance(value, (dict, set))
    ]
