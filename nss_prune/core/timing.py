"""Seconds of a call, and of the stages of a longer work."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from nss_prune.core.models import Forward, call_model, device_of, evaluation

CALLS = 15
"""Calls that are timed at most; the fastest counts, which other processes disturb least."""

PATIENCE = 1.0
"""Seconds after which no further call is timed."""

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
        return least_seconds(lambda: forward(model, example_inputs), lambda: _wait(device))


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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
