"""The arguments of a call: copies for each call, and the tensor that a module is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PLAIN = (bool, int, float, complex, str, bytes, type(None))


def fresh(value: Any) -> Any:
    """A copy of arguments for one more call: a call may write to tensors, and fill a cache.

    Modules, functions and what cannot be copied stay what they are.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(fresh(item) for item in value)
    if isinstance(value, (*PLAIN, nn.Module)) or callable(value):
        return value
    if type(value) is dict:
        return {key: fresh(item) for key, item in value.items()}
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def on_input(
    module: nn.Module, function: Callable[[nn.Module, Tensor], Tensor | None]
) -> RemovableHandle:
    """Call ``function`` with a module and its input before each of its calls.

    The input is the first tensor, given by position or by keyword. A tensor that the function
    returns takes its place.
    """

    def hook(
        called: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        for position, value in enumerate(arguments):
            if isinstance(value, Tensor):
                other = function(called, value)
                changed = (*arguments[:position], other, *arguments[position + 1 :])
                return None if other is None else (changed, keywords)
        name = _input_keyword(keywords)
        other = None if name is None else function(called, keywords[name])
        return None if other is None else (arguments, {**keywords, str(name): other})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def input_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The first tensor that a module is given, by position or by keyword."""
    for value in arguments:
        if isinstance(value, Tensor):
            return value
    name = _input_keyword(keywords)
    if name is None:
        raise TypeError("the module is called without a tensor")
    found: Tensor = keywords[name]
    return found


def _input_keyword(keywords: Mapping[str, Any]) -> str | None:
    tensors = [name for name, value in keywords.items() if isinstance(value, Tensor)]
    preferred = [name for name in ("input", "x", "hidden_states") if name in tensors]
    return next(iter([*preferred, *tensors]), None)
