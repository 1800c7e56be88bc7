"""Mean and covariance of a stream, in one pass and whatever its mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nss_prune.core.processes import summed

FEW = 256  # rows whose products are summed in the precision of the values
PARTS = 8  # of a symmetric product, of which those above the diagonal are not multiplied


def add_products(sums: Tensor, rows: Tensor) -> None:
    """Add Σ x xᵀ to symmetric sums ``[channels, channels]``, in place; in the precision of rows.

    Args:
        rows: ``[channels, rows]``.
    """
    size = max(FEW, -(-len(rows) // PARTS))
    for first in range(0, len(rows), size):
        own = slice(first, first + size)
        product = rows[own] @ rows[: own.stop].T
        sums[own, : own.stop] += product
        sums[:first, own] += product[:, :first].T


class Covariance:
    """Mean and scatter of a stream of rows, in float64.

    Rows are centred on the mean of their own block before they are multiplied, in their own
    precision, and blocks are merged in float64 (Chan, Golub, LeVeque, Updating formulae and a
    pairwise algorithm for computing sample variances, 1979). So a mean that is far larger than
    the deviation, or one that moves along the stream, costs no digits.

    Rows wait until there are as many as channels: a matrix of channels squared for every few of
    them would cost more than they do. They must not be changed while they wait.

    Args:
        channels: Of each row.
        repeats: Values of a channel in each row, each with a mean of its own; the scatter is
            their sum.
        device: Where the sums are.
        precision: In which rows are multiplied; their own by default.

    Attributes:
        rows: Number of rows added.
    """

    def __init__(
        self,
        channels: int,
        repeats: int = 1,
        device: torch.device | str = "cpu",
        precision: torch.dtype | None = None,
    ) -> None:
        self.precision = precision
        self.rows = 0
        self._settled = 0  # of these rows, those that are in the mean and the scatter
        self._mean = torch.zeros(channels, repeats, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        self._waiting: list[Tensor] = []

    @classmethod
    def of(cls, rows: int, mean: Tensor, scatter: Tensor) -> Covariance:
        """What rows with this mean and scatter add up to, see the attributes' shapes."""
        found = cls(0)
        found._mean, found._scatter = mean, scatter
        found.rows = found._settled = rows
        return found

    @property
    def mean(self) -> Tensor:
        """Mean of the rows, ``[channels, repeats]``; zeros where there are none."""
        self._settle()
        return self._mean

    @property
    def scatter(self) -> Tensor:
        """Σ (x - mean)(x - mean)ᵀ over rows and repeats, ``[channels, channels]``."""
        self._settle()
        return self._scatter

    @property
    def second_moments(self) -> Tensor:
        """Σ x xᵀ over rows and repeats, ``[channels, channels]``."""
        return torch.addmm(self.scatter, self.mean, self.mean.T, alpha=self.rows)

    def add(self, values: Tensor) -> None:
        """Add ``[channels, rows]``, or ``[channels, rows, repeats]``."""
        if values.shape[1] == 0:
            return
        self._waiting.append(values if values.dim() == 3 else values[:, :, None])
        self.rows += values.shape[1]
        if self.rows - self._settled >= len(self._mean):
            self._settle()

    def __add__(self, other: Covariance) -> Covariance:
        total = Covariance.of(self.rows, self.mean.clone(), self.scatter.clone())
        total._merge(other.rows, other.mean, other.scatter)
        total.rows += other.rows
        return total

    def move(self, mean: Tensor) -> None:
        """Take the scatter around another mean, as for a sum with others around the same."""
        offset = self.mean - mean
        self._scatter.addmm_(offset, offset.T, alpha=self.rows)
        self._mean.copy_(mean)

    def assign(self, rows: int, mean: Tensor, scatter: Tensor) -> None:
        """Become what :meth:`of` makes of the same, in the memory that is there."""
        self._waiting.clear()
        self._mean.copy_(mean)
        self._scatter.copy_(scatter)
        self.rows = self._settled = rows

    def clear(self) -> None:
        """Forget everything added."""
        self._waiting.clear()
        self._mean.zero_()
        self._scatter.zero_()
        self.rows = self._settled = 0

    def _settle(self) -> None:
        """Put the rows that wait into the mean and the scatter."""
        if not self._waiting:
            return
        block = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, dim=1)
        self._waiting.clear()
        block = block if self.precision is None else block.to(self.precision)
        rows = block.shape[1]
        # Rounded to the values' precision, so that values near it are shifted without an error.
        shift = block.mean(1, keepdim=True)
        shifted = block - shift
        left = shifted.sum(1, dtype=torch.float64)
        self._merge(rows, shift[:, 0].double() + left / rows, left @ left.T / -rows)
        for part in shifted.flatten(1).split(max(FEW, len(left)), dim=1):
            add_products(self._scatter, part)

    def _merge(self, rows: int, mean: Tensor, scatter: Tensor) -> None:
        if rows == 0:
            return
        total = self._settled + rows
        offset = mean - self._mean
        self._scatter += scatter
        self._scatter.addmm_(offset, offset.T, alpha=self._settled * rows / total)
        self._mean += offset * (rows / total)
        self._settled = total


def add_over_processes(covariances: Sequence[Covariance]) -> None:
    """Replace each by that of the rows of all processes, in place."""
    counts = [each.mean.new_tensor(each.rows) for each in covariances]
    totals = [each.mean * each.rows for each in covariances]
    summed([*counts, *totals])
    rows = [int(count.round()) for count in counts]
    # Around the mean of all, the scatters of the processes add up.
    for each, count, total in zip(covariances, rows, totals, strict=True):
        each.move(total / max(1, count))
    summed([each.scatter for each in covariances])
    for each, count in zip(covariances, rows, strict=True):
        each.assign(count, each.mean, each.scatter)
