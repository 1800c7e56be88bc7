"""Where the runs of RQ2 stop: rules over what was measured, so that any can be applied later."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Stop = Literal["match", "accuracy"]


@dataclass(frozen=True)
class Point:
    """A model on its way.

    iteration: from 0, before the first.
    compression_rate: share of the dense model's weights that is gone, 0 to 1.
    check, test: accuracy on the check and on the test data, 0 to 1.
    seconds: what the iteration took; at 0 what made the model, so the time of slicing.
    """

    iteration: int
    compression_rate: float
    check: float
    test: float
    seconds: float


Run = Sequence[Point]  # in order, from iteration 0 on


@dataclass(frozen=True)
class Pair:
    """A method alone and after NeuSemSlice, from one seed."""

    method: str
    seed: int
    alone: Run
    sliced: Run


@dataclass(frozen=True)
class Rule:
    """When X alone and NeuSemSlice + X stop.

    X alone stops before its check accuracy first falls more than `tolerance` (share of 1) below
    the dense model's. NeuSemSlice + X stops likewise ("accuracy"), or as soon as its compression
    rate is that of X alone plus `margin` (share of 1), whatever its accuracy ("match").
    """

    stop: Stop
    tolerance: float
    margin: float = 0.0

    def floor(self, dense: Point) -> float:
        return dense.check - self.tolerance

    def ends(self, pair: Pair) -> tuple[Point, Point]:
        """Where X alone and where NeuSemSlice + X stop."""
        floor = self.floor(pair.alone[0])
        alone = last_held(pair.alone, floor)
        if self.stop == "accuracy":
            return alone, last_held(pair.sliced, floor)
        return alone, first_reaching(pair.sliced, alone.compression_rate + self.margin)


def last_held(run: Run, floor: float) -> Point:
    """The last point before the check accuracy first falls below `floor`; at least point 0."""
    held = run[0]
    for point in run[1:]:
        if point.check < floor:
            break
        held = point
    return held


def first_reaching(run: Run, compression_rate: float) -> Point:
    """The first point that compresses at least so much; the last one if none does."""
    return next((point for point in run if point.compression_rate >= compression_rate), run[-1])


def gain(ends: Sequence[tuple[Point, Point]]) -> dict[str, float]:
    """What NeuSemSlice + X gains on X alone in the mean, in the paper's three figures.

    fewer_iterations: percent of the mean NI.   compression, accuracy: points.
    """
    alone, after = (means(points) for points in zip(*ends, strict=True))
    return {
        "fewer_iterations": 100 * (1 - after[0] / alone[0]) if alone[0] else 0.0,
        "compression": 100 * (after[1] - alone[1]),
        "accuracy": 100 * (after[2] - alone[2]),
    }


def means(points: Iterable[Point]) -> tuple[float, float, float]:
    """The mean iteration, compression rate and test accuracy."""
    values = [(point.iteration, point.compression_rate, point.test) for point in points]
    iteration, compression, test = map(statistics.fmean, zip(*values, strict=True))
    return iteration, compression, test
