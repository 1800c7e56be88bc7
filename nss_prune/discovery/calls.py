"""What modules inside a model are called with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nss_prune.core.arguments import fresh
from nss_prune.core.models import Forward, call_model, evaluation
from nss_prune.core.nested import tensors_in
from nss_prune.errors import GraphError


@dataclass
class Call:
    """The arguments of one call of a module."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def on(self, module: nn.Module) -> Any:
        """What a module gives when it is called like this."""
        arguments, keywords = fresh((self.arguments, self.keywords))
        return module(*arguments, **keywords)


@contextlib.contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """The first call that each of some modules gets inside."""
    calls: dict[nn.Module, Call] = {}

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if module not in calls:
            calls[module] = Call(*fresh((tuple(arguments), dict(keywords))))

    with contextlib.ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(record, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def recorded_calls(
    model: nn.Module,
    modules: Iterable[nn.Module],
    example_inputs: Any,
    forward: Forward = call_model,
) -> dict[nn.Module, Call]:
    """The first call of each of some modules in one call of the model.

    Raises:
        GraphError: The model does not run.
    """
    with recording(modules) as calls, evaluation(model), torch.no_grad():
        try:
            forward(model, example_inputs)
        except Exception as error:
            raise GraphError(
                f"{type(model).__name__} does not run on the example inputs: {error}; give the "
                "inputs of one call: a tensor, a tuple of arguments or a dict"
            ) from error
    return calls


def look(module: nn.Module, call: Call | None) -> tuple[Any, ...]:
    """What modules have in common that work the same: class, structure, settings and inputs."""
    settings = [
        (path, name, value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, (bool, int, str)) and name != "training"
    ]
    shapes = [(name, value.shape) for name, value in module.named_parameters()]
    inputs = [] if call is None else tensors_in((call.arguments, call.keywords))
    called_with = [call is None, *(value.shape for value in inputs)]
    return type(module), repr(module), *settings, *shapes, *called_with
