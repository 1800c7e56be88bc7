"""Attach hooks for a while; they are always detached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol


class Handle(Protocol):
    """What registering a hook returns."""

    def remove(self) -> None:
        """Detach the hook."""


Hook = Callable[..., Any]
Register = Callable[[Any], Handle]
"""A bound method that registers a hook, such as ``layer.register_forward_hook``."""


@contextlib.contextmanager
def attached(*hooks: tuple[Register, Hook]) -> Iterator[None]:
    """Within the context, hooks are attached; afterwards they are not, whatever was raised.

    ::

        with attached((layer.register_forward_hook, see), (norm.register_forward_pre_hook, zero)):
            model(inputs)

    Args:
        *hooks: What registers a hook, and the hook. Options of the registration are bound by
            ``functools.partial(layer.register_forward_hook, always_call=True)``. They are attached
            in order and detached in the opposite one; where one cannot be, none is.
    """
    with contextlib.ExitStack() as stack:
        for register, hook in hooks:
            stack.callback(register(hook).remove)
        yield
