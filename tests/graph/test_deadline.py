"""A time limit that works, names the layer, and never reaches the caller's code."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from networks import fingerprint, mlp
from nss_prune import NSSPruner
from nss_prune.errors import GraphError
from nss_prune.graph import deadline
from nss_prune.graph.deadline import _Expired, within


def circle(module: nn.Module) -> None:
    while True:
        try:
            time.sleep(0.001)
        except Exception:
            continue


def spin(module: nn.Module) -> None:
    while True:
        sum(range(100))


@pytest.mark.parametrize("never_ends", [circle, spin])
def test_what_never_ends_is_interrupted_and_named(never_ends: Callable[..., None]) -> None:
    """Whether it computes, or waits."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    start = time.monotonic()
    with pytest.raises(GraphError, match=r"0\.2 s of CPU time and 2 s in all.*'0'.*timeout"):
        within(0.2, model, lambda: never_ends(model[0]))
    assert time.monotonic() - start < 10


def compute(seconds: float) -> float:
    """Compute for some seconds of CPU time; the seconds that went by on the wall."""
    start, end = time.monotonic(), time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(100))
    return time.monotonic() - start


@pytest.mark.parametrize("own_clock", [True, False])
def test_the_limit_is_on_cpu_time(own_clock: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the thread; where the system does not tell it, of the process."""
    if not own_clock:
        monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    model = nn.Linear(2, 2)
    assert within(0.2, model, lambda: time.sleep(0.4)) is None
    with pytest.raises(GraphError):
        within(0.1, model, lambda: compute(0.8))


def test_the_load_of_the_machine_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads compute as well: it takes longer than the limit, and is left in peace."""
    monkeypatch.setattr(deadline, "WALL", 1000)
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            sum(range(100))

    others = [threading.Thread(target=load) for _ in range(3)]
    for other in others:
        other.start()
    try:
        assert within(0.2, nn.Linear(2, 2), lambda: compute(0.15)) > 0.2
    finally:
        stop.set()
        for other in others:
            other.join()


class Finalised:
    """Swallows what is raised in it, as Python does for every finaliser."""

    def __del__(self) -> None:
        for _ in range(50):
            time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_a_finaliser_swallows_comes_again() -> None:
    model = nn.Linear(2, 2)

    def finalise_and_circle() -> None:
        Finalised()
        circle(model)

    with pytest.raises(GraphError):
        within(0.1, model, finalise_and_circle)


def raising(error: type[BaseException]) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_what_is_done_in_time_is_left_in_peace(error: type[BaseException]) -> None:
    model = nn.Linear(2, 2)
    assert within(5, model, lambda: 3) == 3
    with pytest.raises(error):
        within(5, model, raising(error))


def test_none_escapes_from_what_ends_just_in_time() -> None:
    """Nothing is raised in this thread or one that starts afterwards; all threads have ended."""
    model, threads = nn.Linear(2, 2), threading.active_count()
    outcomes = {True: 0, False: 0}

    def until(end: float) -> None:
        while time.thread_time() < end:
            sum(range(10))

    for number in range(200):
        seconds = 0.002 + number * 1e-6
        end = seconds + number * 1e-4  # from just in time to late by a few turns of the threads
        try:
            within(seconds, model, lambda end=end: until(end))
            outcomes[True] += 1
        except GraphError:
            outcomes[False] += 1
        started = threading.Thread(target=sum, args=(range(1000),))
        started.start()
        started.join()
    assert sum(outcomes.values()) == 200
    assert min(outcomes.values()) > 0
    assert threading.active_count() == threads


def test_only_the_thread_of_the_function_is_interrupted(monkeypatch) -> None:
    hit, inside, original = set(), set(), deadline._raise_in

    def counted(thread: int | None, error: type[BaseException]) -> None:
        hit.add(thread)
        original(thread, error)

    def function() -> None:
        inside.add(threading.get_ident())
        circle(model)

    monkeypatch.setattr(deadline, "_raise_in", counted)
    model = nn.Linear(2, 2)
    with pytest.raises(GraphError):
        within(0.05, model, function)
    assert hit == inside
    assert threading.get_ident() not in hit


@pytest.mark.parametrize("seconds", [0.02, 0.2])
def test_a_keyboard_interrupt_passes_and_the_function_has_ended(seconds: float) -> None:
    model, threads = nn.Linear(2, 2), threading.active_count()
    ctrl_c = partial(signal.pthread_kill, threading.main_thread().ident, signal.SIGINT)
    timer = threading.Timer(seconds, ctrl_c)
    # Workers of pytest-xdist ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            within(30, model, lambda: circle(model))
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert threading.active_count() == threads


class Interrupted(nn.Sequential):
    """Ctrl-C comes while it computes."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def test_a_keyboard_interrupt_passes_through_a_trace() -> None:
    model = Interrupted(*mlp())
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        NSSPruner(model, torch.randn(2, 12).double())
    after = fingerprint(model)
    assert after["hooks"] == before["hooks"]
    assert after["gradients"] == before["gradients"]


def test_a_function_that_expects_the_interruption_may_return() -> None:
    def survives() -> int:
        try:
            circle(nn.Linear(2, 2))
        except _Expired:
            return 3
        return 4

    assert within(0.05, nn.Linear(2, 2), survives) == 3


def test_a_thread_that_cannot_start_leaves_nothing(monkeypatch) -> None:
    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with pytest.raises(RuntimeError, match="new thread"):
        within(0.05, nn.Linear(2, 2), lambda: None)


def test_the_function_sees_the_state_of_the_caller() -> None:
    def state() -> tuple[object, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_device(),
        )

    model = nn.Linear(2, 2)
    assert within(5, model, state) == state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert within(5, model, state) == state()
    with torch.inference_mode():
        assert within(5, model, state) == state()


class InterruptedOnce:
    """A lock that is interrupted once, when the caller has just acquired it."""

    def __init__(self, lock: Any, caller: threading.Thread) -> None:
        self.lock, self.caller, self.raised = lock, caller, False

    def acquire(self, timeout: float = -1) -> bool:
        acquired = self.lock.acquire(timeout=timeout)
        if acquired and not self.raised and threading.current_thread() is self.caller:
            self.raised = True
            raise KeyboardInterrupt
        return acquired

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lock, name)


def test_an_interrupt_that_comes_with_the_end_of_the_function_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raised: list[BaseException] = []
    original = deadline._Worker.__init__

    def init(self: Any, function: Any) -> None:
        original(self, function)
        self._running = InterruptedOnce(self._running, caller)

    def call() -> None:
        try:
            deadline.within(60, nn.Identity(), lambda: time.sleep(0.1))
        except KeyboardInterrupt as error:
            raised.append(error)

    caller = threading.Thread(target=call, daemon=True)
    monkeypatch.setattr(deadline._Worker, "__init__", init)
    monkeypatch.setattr(deadline, "POLL", 60)  # the lock is acquired once
    caller.start()
    caller.join(20)
    assert not caller.is_alive()
    assert len(raised) == 1
