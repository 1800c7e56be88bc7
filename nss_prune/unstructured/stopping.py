"""When iterative pruning stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from nss_prune.errors import ArgumentError


@dataclass(frozen=True)
class Iteration:
    """The state of a model after an iteration.

    Attributes:
        number: from 1; 0 is the state before the first.
        compression_rate: share of the dense Linear and convolution weights that are gone.
        accuracy: what `evaluate` returned, a share in [0, 1]; None without it.
        seconds: wall-clock time of pruning, fine-tuning and evaluating.
    """

    number: int
    compression_rate: float
    accuracy: float | None
    seconds: float


class StopRule:
    """When to stop; derive from it and override one of the two to write another.

    Attributes:
        needs_accuracy: whether it reads the accuracy, so that `evaluate` must be given.
        may_reject: whether it overrides `rejects`, so that the state before is remembered.
    """

    needs_accuracy: ClassVar[bool] = False
    may_reject: ClassVar[bool] = False

    def reached(self, iteration: Iteration) -> bool:
        """Whether this iteration, which is accepted, is the last."""
        return False

    def rejects(self, iteration: Iteration) -> bool:
        """Whether this iteration must be undone, so that the one before it is the last."""
        return False


@dataclass(frozen=True)
class Iterations(StopRule):
    """Stop after so many iterations in all, those before a resumption included.

    Attributes:
        count: at least 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ArgumentError(f"Iterations is {self.count}: pass 1 or more")

    def reached(self, iteration: Iteration) -> bool:
        return iteration.number >= self.count


@dataclass(frozen=True)
class CompressionRate(StopRule):
    """Stop with the first iteration that has this compression rate or more.

    Attributes:
        share: of the dense weights that are to be gone, in (0, 1).
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ArgumentError(
                f"CompressionRate is {self.share}: it is a share of the dense weights, pass a "
                "number in (0, 1), for example 0.9 for 90 %"
            )

    def reached(self, iteration: Iteration) -> bool:
        return iteration.compression_rate >= self.share


@dataclass(frozen=True)
class AccuracyTolerance(StopRule):
    """Stop before the first iteration that loses more accuracy than this.

    That iteration is undone and not yielded: the model has the masks, and the weights, of
    the last iteration within the tolerance.

    Attributes:
        points: loss that is tolerated, in percentage points, at least 0.
        reference: accuracy that the loss counts from, a share in [0, 1].
    """

    needs_accuracy: ClassVar[bool] = True
    may_reject: ClassVar[bool] = True

    points: float
    reference: float

    def __post_init__(self) -> None:
        if not self.points >= 0:
            raise ArgumentError(f"points is {self.points}: pass 0 or more percentage points")
        check_accuracy("reference", self.reference)

    def rejects(self, iteration: Iteration) -> bool:
        assert iteration.accuracy is not None
        return iteration.accuracy < self.reference - self.points / 100


def checked_rules(
    until: StopRule | Sequence[StopRule], evaluate: Callable[[nn.Module], float] | None
) -> tuple[StopRule, ...]:
    """The rules as a tuple.

    Raises:
        ArgumentError: There is none, something else, or one that needs ``evaluate``.
    """
    rules = tuple(until) if isinstance(until, Sequence) else (until,)
    if not rules or not all(isinstance(rule, StopRule) for rule in rules):
        raise ArgumentError(
            f"until is {until!r}: pass one or more of Iterations, CompressionRate, "
            "AccuracyTolerance, for example until=Iterations(10)"
        )
    if evaluate is None and any(rule.needs_accuracy for rule in rules):
        raise ArgumentError(f"until is {until!r}, which needs the accuracy: pass evaluate")
    return rules


def check_accuracy(name: str, accuracy: float) -> None:
    """Refuse what is no share in [0, 1].

    Raises:
        ArgumentError: Says what is allowed.
    """
    if not 0 <= accuracy <= 1:
        raise ArgumentError(
            f"{name} is {accuracy}: an accuracy is a share in [0, 1], for example 0.984 for 98.4 %"
        )
