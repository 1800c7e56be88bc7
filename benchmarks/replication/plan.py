"""What to run next: the pieces that fill most of the paper's numbers a second, within the time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from benchmarks.replication.pieces import Piece


@dataclass(frozen=True)
class Estimate:
    """Seconds that a piece is expected to take, and those of the training of its model before."""

    piece: Piece
    seconds: float
    training: float

    def total(self, trained: Collection[str]) -> float:
        """Both, or the piece's alone where its model is trained."""
        return self.seconds + (0.0 if self.piece.model in trained else self.training)

    def worth(self, trained: Collection[str]) -> float:
        """The paper's numbers that it fills a second."""
        return self.piece.numbers / max(self.total(trained), 1e-9)


@dataclass(frozen=True)
class Step:
    """A piece, or (``only_training``) the training of its model alone, and the seconds of that."""

    estimate: Estimate
    seconds: float
    only_training: bool = False


def next_step(
    estimates: Sequence[Estimate], trained: Collection[str], seconds_left: float
) -> Step | None:
    """The step that is worth most of those that fit into the time; None where none does.

    Where no piece fits, the training of a model may: it is cached for the next run.
    """
    fitting = [one for one in estimates if one.total(trained) <= seconds_left]
    if fitting:
        best = max(fitting, key=lambda one: one.worth(trained))
        return Step(best, best.total(trained))
    untrained = [
        one for one in estimates if one.piece.model not in trained and one.training <= seconds_left
    ]
    if not untrained:
        return None
    best = max(untrained, key=lambda one: one.worth(trained))
    return Step(best, best.training, only_training=True)


def planned(
    estimates: Sequence[Estimate], trained: Collection[str], seconds: float
) -> tuple[list[Step], list[Estimate]]:
    """The steps that would be run one after the other in so many seconds, and what is left over."""
    steps: list[Step] = []

    def take(step: Step) -> float:
        steps.append(step)
        return step.seconds

    return steps, run_steps(estimates, trained, seconds, take)


def run_steps(
    estimates: Sequence[Estimate],
    trained: Collection[str],
    seconds: float,
    run: Callable[[Step], float],
) -> list[Estimate]:
    """Run step after step while one fits; what is left over.

    run: Runs a step; the seconds that it took.
    """
    left, done = list(estimates), set(trained)
    while (step := next_step(left, done, seconds)) is not None:
        seconds -= run(step)
        done.add(step.estimate.piece.model)
        if not step.only_training:
            left.remove(step.estimate)
    return left
