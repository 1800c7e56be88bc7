"""A time limit for code that may never return, such as a search that goes round in circles."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from torch import nn

from nss_prune.errors import GraphError

AGAIN = 1.0  # seconds between two interruptions


class _Expired(BaseException):
    """Raised in the thread that is late; not an Exception, which that code might swallow."""


@contextlib.contextmanager
def deadline(seconds: float, model: nn.Module) -> Iterator[None]:
    """Interrupt the body after ``seconds``. Only Python code can be interrupted.

    Args:
        model: To name the layer that the body was busy with.

    Raises:
        GraphError: The body was not done in time.
    """
    lock = threading.Lock()
    done = threading.Event()
    thread = ctypes.c_ulong(threading.get_ident())

    def interrupt() -> None:
        wait = seconds
        # Again and again: Python drops what is raised while it runs a finaliser.
        while not done.wait(wait):
            wait = AGAIN
            with lock:
                if not done.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Expired))

    def stop() -> None:
        with lock:
            done.set()

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        yield
    except _Expired as error:
        stop()
        layer = _layer_at_work(error.__traceback__, model)
        raise GraphError(
            f"torch-pruning was not done with {type(model).__name__} in {seconds:.3g} s"
            f"{f', it was busy with {layer!r}' if layer else ''}; name the layer in "
            "ignored_layers, or raise timeout"
        ) from None
    finally:
        stop()


def _layer_at_work(traceback: TracebackType | None, model: nn.Module) -> str:
    """The name of the layer that the innermost frames hold, or ""."""
    names = {module: name for name, module in model.named_modules() if name}
    found = ""
    while traceback is not None:
        for value in list(traceback.tb_frame.f_locals.values()):
            found = names.get(_module_of(value), found)
        traceback = traceback.tb_next
    return found


def _module_of(value: Any) -> Any:
    """The module behind a local of torch-pruning: itself, or that of a node or a dependency."""
    if isinstance(value, nn.Module):
        return value
    for attribute in ("module", "target"):
        inner = getattr(value, attribute, None) if hasattr(value, "__dict__") else None
        if isinstance(inner, nn.Module):
            return inner
        if inner is not None and isinstance(getattr(inner, "module", None), nn.Module):
            return inner.module
    return None
