"""Put something back after a context, as a whole: also where Ctrl-C comes meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def afterwards(put_back: Callable[[], None]) -> Iterator[None]:
    """Call something when the context is left, whatever its body raises.

    ::

        before = layer.bias, layer.weight
        with afterwards(lambda: restore(layer, before)):
            change(layer)
            yield

    Args:
        put_back: Called again where Ctrl-C or an error breaks it off, which then goes on. So it
            must be as good from its middle, and every change belongs into the body.
    """
    try:
        yield
    finally:
        # Not a call of completed(): an interrupt may come before its first line.
        try:
            put_back()
        except BaseException:
            put_back()
            raise


def completed(put_back: Callable[[], None]) -> None:
    """Put something back now, see :func:`afterwards`."""
    with afterwards(put_back):
        pass
