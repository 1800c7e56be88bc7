"""A time limit for code that may never return, such as a search that goes round in circles."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from nss_prune.errors import GraphError

AGAIN = 1.0  # seconds between two interruptions
SOON = 0.001  # seconds until the next look at a thread that is not in the body


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
    alarm = _Alarm(seconds, sys._getframe(1))  # contextlib's __enter__
    try:
        alarm.start()
        yield
    except _Expired as error:
        alarm.stop()
        layer = _layer_at_work(error.__traceback__, model)
        raise GraphError(
            f"torch-pruning was not done with {type(model).__name__} in {seconds:.3g} s"
            f"{f', it was busy with {layer!r}' if layer else ''}; name the layer in "
            "ignored_layers, or raise timeout"
        ) from None
    finally:
        alarm.stop()


class _Alarm:
    """A thread that interrupts the one which made it, from some time on until it is stopped.

    Args:
        seconds: Until the first interruption.
        entering: The frame of the context manager's __enter__. No interruption is sent while that
            or its __exit__ runs, which would leave them half done.
    """

    def __init__(self, seconds: float, entering: FrameType) -> None:
        self._seconds = seconds
        self._manager = entering.f_locals["self"]
        self._stopped = False
        self._target = threading.get_ident()
        # Held while the body runs. An Event would not do: an interruption can come while it is
        # set, and leave the lock inside it held for ever.
        self._running = threading.Lock()
        self._thread = threading.Thread(target=self._interrupt, daemon=True)

    def start(self) -> None:
        """Begin to wait."""
        self._running.acquire()
        self._thread.start()

    def stop(self) -> None:
        """Make sure that no interruption comes any more, whatever comes meanwhile.

        Raises:
            KeyboardInterrupt: One came meanwhile; the alarm is stopped all the same.
        """
        other: BaseException | None = None
        while not self._stopped:
            try:
                self._stop()
            except _Expired:
                continue
            except BaseException as error:
                other = error
        if other is not None:
            raise other

    def _stop(self) -> None:
        if self._running.locked():
            self._running.release()
        with contextlib.suppress(RuntimeError):  # it has not begun, and will find the lock free
            self._thread.join()
        _raise_in(self._target, None)  # take back what has not been raised yet
        self._manager = None
        self._stopped = True

    def _interrupt(self) -> None:
        wait = self._seconds
        # Again and again: Python drops what is raised while it runs a finaliser.
        while not self._running.acquire(timeout=wait):
            wait = SOON
            if self._in_body():
                wait = AGAIN
                _raise_in(self._target, _Expired)

    def _in_body(self) -> bool:
        """Whether the thread is neither on its way into the body nor on its way out."""
        frame = sys._current_frames().get(self._target)
        while frame is not None:
            of_manager = frame.f_code.co_filename == contextlib.__file__
            if of_manager and frame.f_locals.get("self") is self._manager:
                return False
            frame = frame.f_back
        return True


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread, as soon as it runs Python code; None takes it back."""
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


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
