"""The arguments of a call: copies for each call, and the tensor that a module is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nss_prune.core.multihead import heads_called as heads_called
from nss_prune.errors import ArgumentError

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
    # A cache may hold parts of an autograd graph, which deepcopy refuses.
    held = {id(tensor): tensor.detach().clone() for tensor in _tensors_held(value, set())}
    try:
        return copy.deepcopy(value, held)
    except Exception:
        return value


def _tensors_held(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in an object, its attributes, and theirs.

    Args:
        seen: Ids of what was looked at before.
    """
    if id(value) in seen or isinstance(value, (*PLAIN, type, nn.Module)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_held(item, seen)
    elif isinstance(value, (tuple, list, set)):
        for item in value:
            yield from _tensors_held(item, seen)
    elif not callable(value):
        yield from _tensors_held(getattr(value, "__dict__", None), seen)


def on_input(
    module: nn.Module, function: Callable[[nn.Module, Tensor], Tensor | None]
) -> RemovableHandle:
    """Call ``function`` with a module and its input before each of its calls.

    A tensor that the function returns takes the place of the input.
    """

    def hook(
        called: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        other = function(called, input_of(arguments, keywords))
        return None if other is None else with_input(arguments, keywords, other)

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def input_of(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> Tensor:
    """The input of a call: its first tensor, by position or else by keyword.

    Raises:
        ArgumentError: There is none.
    """
    place = _place_of_input(arguments, keywords)
    found: Tensor = arguments[place] if isinstance(place, int) else keywords[place]
    return found


def with_input(
    arguments: tuple[Any, ...], keywords: Mapping[str, Any], other: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with another tensor in the place of its input."""
    place = _place_of_input(arguments, keywords)
    if isinstance(place, str):
        return arguments, {**keywords, place: other}
    return (*arguments[:place], other, *arguments[place + 1 :]), dict(keywords)


def _place_of_input(arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> int | str:
    for position, value in enumerate(arguments):
        if isinstance(value, Tensor):
            return position
    names = [name for name, value in keywords.items() if isinstance(value, Tensor)]
    if not names:
        raise ArgumentError("a layer is called without a tensor; name it in ignored_layers")
    return "input" if "input" in names else names[0]
