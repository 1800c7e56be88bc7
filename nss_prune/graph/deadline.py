"""A time limit for code that may never return, such as a search that goes round in circles.

The limit is on the CPU time of the thread that runs the code, so that the load of the machine does
not decide. A generous limit on the clock on the wall is for code that waits for ever.

The code runs in a thread of its own, and only that thread is ever interrupted: an interruption
that comes late finds a thread that has nothing left to do, never the caller. The thread does not
end before it is allowed to, because a new one could have its number then.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import nn

from nss_prune.core.afterwards import afterwards
from nss_prune.core.thread_state import with_state_of_this_thread
from nss_prune.errors import GraphError

AGAIN = 1.0  # seconds between two interruptions
POLL = 0.1  # seconds between two looks at the CPU time
WALL = 10.0  # seconds in all, for each second of CPU time

Made = TypeVar("Made")


class _Expired(BaseException):
    """Raised in the thread that is late; not an Exception, which that code might swallow."""


def within(seconds: float, model: nn.Module, function: Callable[[], Made]) -> Made:
    """What a function returns, unless it takes longer. Only Python code can be interrupted.

    Args:
        seconds: Of CPU time until it is interrupted; or ten times as many on the wall.
        model: To name the layer that it was busy with.
        function: Called in another thread with the state of this one, see
            :func:`with_state_of_this_thread`.

    Raises:
        GraphError: It was not done in time.
        KeyboardInterrupt: One came meanwhile; the function was interrupted.
        Also whatever the function raises.
    """
    worker = _Worker(with_state_of_this_thread(function))
    with afterwards(worker.end):
        worker.start()
        worker.wait_for_work(seconds)
    if worker.returned:
        return worker.results[0]
    if worker.error is not None and not isinstance(worker.error, _Expired):
        raise worker.error
    layer = _layer_at_work(None if worker.error is None else worker.error.__traceback__, model)
    raise GraphError(
        f"torch-pruning was not done with {type(model).__name__} within {seconds:.3g} s of CPU "
        f"time and {WALL * seconds:.3g} s in all{f', it was busy with {layer!r}' if layer else ''};"
        " name the layer in ignored_layers, or raise timeout"
    )


class _Worker(threading.Thread, Generic[Made]):
    """A thread that calls a function once, and then waits until it may end.

    Attributes:
        results: What the function returned.
        returned: Whether it did.
        error: What it raised.
    """

    def __init__(self, function: Callable[[], Made]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.results: list[Made] = []
        self.returned = False
        self.error: BaseException | None = None
        self._began = self._stopping = self._done = self._may_end = False
        # Locks and no Events: an interruption in the midst of setting one would leave the lock
        # inside of it held for ever.
        self._running, self._leave = threading.Lock(), threading.Lock()
        self._running.acquire()
        self._leave.acquire()

    def run(self) -> None:
        """Of the thread; an interruption may come anywhere in it."""
        while not self._may_end:
            try:
                self._call()
                self._done = True
                if self._running.locked():
                    self._running.release()
                self._leave.acquire()
            except _Expired:
                continue

    def _call(self) -> None:
        if self._began or self._stopping:
            return
        self._began = True
        try:
            self.results.append(self._function())
            self.returned = True
        except BaseException as error:
            self.error = error

    def wait(self, seconds: float) -> bool:
        """Whether the function is done within some time."""
        # The lock only wakes: an interrupt may come once it is acquired, before that is known.
        if not self._done:
            self._running.acquire(timeout=seconds)
        return self._done

    def wait_for_work(self, seconds: float) -> None:
        """Wait until the function is done, has computed for some seconds, or stands still."""
        assert self.ident is not None
        computed = _cpu_clock(self.ident)
        end = time.monotonic() + WALL * seconds
        while True:
            left = min(seconds - computed(), end - time.monotonic())
            if left <= 0 or self.wait(min(left, POLL)):
                return

    def end(self) -> None:
        """Interrupt the function until it is done, then let the thread end.

        Raises:
            KeyboardInterrupt: One came meanwhile; the thread has ended all the same.
        """
        other: BaseException | None = None
        while not self._may_end or self.is_alive():
            try:
                self._finish()
            except BaseException as error:
                other = error
        if other is not None:
            raise other

    def _finish(self) -> None:
        self._stopping = True  # one that is just starting calls nothing any more
        while self.is_alive() and not self._done:
            _raise_in(self.ident, _Expired)
            # Again and again: Python drops what is raised while it runs a finaliser.
            self.wait(AGAIN)
        self._may_end = True
        if self._leave.locked():
            self._leave.release()
        if self.is_alive():
            self.join()


def _cpu_clock(thread: int) -> Callable[[], float]:
    """Seconds that a running thread has computed; the whole process where no other clock is."""
    clock_of = getattr(time, "pthread_getcpuclockid", None)
    if clock_of is None:
        start = time.process_time()
        return lambda: time.process_time() - start
    clock = clock_of(thread)
    return lambda: time.clock_gettime(clock)


def _raise_in(thread: int | None, error: type[BaseException]) -> None:
    """Raise an exception in a thread, as soon as it runs Python code."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), ctypes.py_object(error))


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
