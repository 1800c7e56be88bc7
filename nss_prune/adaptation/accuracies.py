"""How well each task is done after each training, and how much of it is forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies of the tasks, one row after each task that was learned.

    Attributes:
        names: Of the tasks, in the order in which they were learned.
        rows: ``[trainings][tasks]``: the accuracy, in [0, 1], of the tasks learned until then; NaN
            where a task has no validation data.
    """

    names: tuple[str, ...] = ()
    rows: tuple[tuple[float, ...], ...] = ()

    def with_row(self, names: Sequence[str], accuracies: Sequence[float]) -> AccuracyMatrix:
        """The matrix with another row, after the last of some tasks was learned.

        A row of as many tasks as the last one has takes its place: a task was trained on.
        """
        kept = self.rows[:-1] if self.rows and len(self.rows[-1]) == len(names) else self.rows
        return AccuracyMatrix(tuple(names), (*kept, tuple(accuracies)))

    @property
    def average(self) -> float:
        """Mean accuracy of all tasks after the last training (Lopez-Paz and Ranzato 2017, ACC)."""
        return _mean(self.rows[-1]) if self.rows else math.nan

    @property
    def forgetting(self) -> tuple[float, ...]:
        """Of each task but the last: its best accuracy before the last training, minus the present.

        f_j = max over l < k of a[l][j] − a[k][j] (Chaudhry et al. 2018, arXiv:1801.10112, Eq. 3).
        Negative where a task has become better.
        """
        if len(self.rows) < 2:
            return ()
        *before, last = self.rows
        return tuple(
            max(row[task] for row in before if len(row) > task) - last[task]
            for task in range(len(before[-1]))
        )

    @property
    def average_forgetting(self) -> float:
        """The mean of :attr:`forgetting`; NaN before a second task."""
        return _mean(self.forgetting)

    def __repr__(self) -> str:
        width = max([len(name) for name in self.names] + [6])
        header = ["after".ljust(width), *(name.rjust(width) for name in self.names)]
        lines = ["  ".join(header)]
        for row in self.rows:
            cells = [f"{100 * value:.2f}".rjust(width) for value in row]
            lines.append("  ".join([self.names[len(row) - 1].ljust(width), *cells]))
        if self.forgetting:
            cells = [f"{100 * value:.2f}".rjust(width) for value in self.forgetting]
            lines.append("  ".join(["forgot".ljust(width), *cells]))
        return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
