"""Seconds of a call, of calls that take turns, and of the stages of a longer work."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nss_prune.core.models import Forward, call_model, device_of, evaluation

CALLS = 15
"""Calls that are timed at most; the fastest counts, which other processes disturb least."""

PATIENCE = 1.0
"""Seconds after which no further call is timed."""

ROUNDS = 101
"""In which every call is timed once, at most."""

LEAST_ROUNDS = 5

LONGEST = 10.0
"""Seconds after which no further round begins, once there were :data:`LEAST_ROUNDS`."""

logger = logging.getLogger("nss_prune")


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Log the name of a stage (level DEBUG), and add the seconds of the body to it."""
    logger.debug("%s", name)
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin


def call_seconds(model: nn.Module, example_inputs: Any, forward: Forward = call_model) -> float:
    """Least seconds of a call in evaluation mode, after one that warms up.

    The call is repeated up to :data:`CALLS` times, for at most about :data:`PATIENCE` seconds; one
    that takes longer is timed once.
    """
    device = device_of(model)
    with evaluation(model), torch.no_grad(), torch.random.fork_rng():
        return least_seconds(lambda: forward(model, example_inputs), lambda: wait_for(device))


def least_seconds(call: Callable[[], Any], wait: Callable[[], None] = lambda: None) -> float:
    """Least seconds of a call, as :func:`call_seconds` takes it.

    Args:
        wait: Returns when the device has done what it was given.
    """
    first, *taken = _timed(call, wait, 1)
    if first < PATIENCE:
        taken = _timed(call, wait, CALLS)
    return min(taken or [first])


def _timed(call: Callable[[], Any], wait: Callable[[], None], most: int) -> list[float]:
    taken: list[float] = []
    while len(taken) < most and sum(taken) < PATIENCE:
        begin = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - begin)
    return taken


def wait_for(device: torch.device) -> None:
    """Return when a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Timing:
    """Seconds of a call over the rounds.

    Attributes:
        median: Of all rounds.
        low, high: The first and the third quartile.
        rounds: How many there were.
    """

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(seconds: list[float]) -> Timing:
        """Of two rounds at least."""
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return Timing(median, low, high, len(seconds))

    @property
    def text(self) -> str:
        """In milliseconds, such as "20.2 (19.8-21.0)"."""
        median, low, high = (f"{value * 1e3:.3g}" for value in (self.median, self.low, self.high))
        return f"{median} ({low}-{high})"


def alternating(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int = ROUNDS,
    patience: float = LONGEST,
    least: int = LEAST_ROUNDS,
) -> dict[str, Timing]:
    """The seconds of each call, one after the other in every round, after two that warm up.

    Whatever else a machine does meets all of them alike.

    Each round begins with another of the calls, so that none is always timed after the same one.

    Args:
        calls: Each returns when its work is done.
        rounds: At most.
        patience: Seconds after which no further round begins.
        least: Rounds that there are whatever they take, 2 or more.
    """
    for call in calls.values():
        call()
        call()
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= least and time.perf_counter() - begin > patience:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            before = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - before)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}
