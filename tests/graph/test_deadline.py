"""A time limit that works, names the layer, and never fires afterwards."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
from torch import nn

from nss_prune.errors import GraphError
from nss_prune.graph.deadline import _Expired, deadline


def circle(module: nn.Module) -> None:
    while True:
        try:
            time.sleep(0.001)
        except Exception:
            continue


def test_what_never_ends_is_interrupted_and_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    start = time.monotonic()
    with pytest.raises(GraphError, match=r"0\.2 s.*'0'.*timeout"), deadline(0.2, model):
        circle(model[0])
    assert time.monotonic() - start < 10


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

    with pytest.raises(GraphError), deadline(0.1, model):
        finalise_and_circle()


def test_what_is_done_in_time_is_left_in_peace() -> None:
    model = nn.Linear(2, 2)
    with deadline(0.05, model):
        pass
    time.sleep(0.1)
    with pytest.raises(ZeroDivisionError), deadline(5, model):
        raise ZeroDivisionError


def test_an_interruption_at_once_comes_in_the_body_alone() -> None:
    model = nn.Linear(2, 2)
    for _ in range(50):
        with pytest.raises(GraphError), deadline(0.0, model):
            circle(model)


def test_none_escapes_from_a_body_that_ends_just_in_time() -> None:
    model = nn.Linear(2, 2)
    for number in range(100):
        seconds = 0.001 + number * 1e-6
        with contextlib.suppress(GraphError), deadline(seconds, model):
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                sum(range(10))
        sum(range(100))  # an interruption that came after the body would be raised here


def test_an_interruption_while_it_stops_is_survived(monkeypatch) -> None:
    interrupted = []
    join = threading.Thread.join

    def interrupted_join(thread: threading.Thread, *arguments: float) -> None:
        if not interrupted:
            interrupted.append(thread)
            raise _Expired
        join(thread, *arguments)

    monkeypatch.setattr(threading.Thread, "join", interrupted_join)
    with deadline(5, nn.Linear(2, 2)):
        pass
    assert not interrupted[0].is_alive()


def ends_with(error: type[BaseException] | None) -> None:
    if error is not None:
        raise error


@pytest.mark.parametrize("where", ["body", "stop"])
def test_a_keyboard_interrupt_passes_and_nothing_comes_after_it(monkeypatch, where: str) -> None:
    join = threading.Thread.join
    raised = []

    def interrupted_join(thread: threading.Thread, *arguments: float) -> None:
        if where == "stop" and not raised:
            raised.append(thread)
            raise KeyboardInterrupt
        join(thread, *arguments)

    monkeypatch.setattr(threading.Thread, "join", interrupted_join)
    threads = threading.active_count()
    ended = KeyboardInterrupt if where == "body" else None
    with pytest.raises(KeyboardInterrupt), deadline(0.05, nn.Linear(2, 2)):
        ends_with(ended)
    assert threading.active_count() == threads
    time.sleep(0.1)


def test_a_thread_that_cannot_start_leaves_nothing(monkeypatch) -> None:
    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with pytest.raises(RuntimeError, match="new thread"), deadline(0.05, nn.Linear(2, 2)):
        pass


def test_a_deadline_in_an_exit_stack() -> None:
    model = nn.Linear(2, 2)
    stack = contextlib.ExitStack()
    with stack:
        stack.enter_context(pytest.raises(GraphError))
        stack.enter_context(deadline(0.05, model))
        circle(model)
