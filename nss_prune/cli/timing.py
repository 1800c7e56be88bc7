"""Seconds of calls that take turns: whatever else a machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ROUNDS = 101
"""In which every call is timed once, at most."""

LEAST_ROUNDS = 5

PATIENCE = 10.0
"""Seconds after which no further round begins, once there were :data:`LEAST_ROUNDS`."""


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
    patience: float = PATIENCE,
) -> dict[str, Timing]:
    """The seconds of each call, one after the other in every round, after two that warm up.

    Each round begins with another of the calls, so that none is always timed after the same one.

    Args:
        calls: Each returns when its work is done.
        rounds: At most.
        patience: Seconds after which no further round begins.
    """
    for call in calls.values():
        call()
        call()
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > patience:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            before = time.perf_counter()
            calls[name]()
            taken[name].append(time.perf_counter() - before)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}
