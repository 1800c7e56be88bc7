"""What a board measures: criteria, allocations and kinds of compensation, and one cell of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.rivals.ranking import CRITERIA as TORCH_PRUNING

SEMANTIC, VBP, CORP, DIVERGENCE = "semantic", "vbp", "corp", "divergence"
CRITERIA = (*TORCH_PRUNING, SEMANTIC, VBP, CORP, DIVERGENCE)
WHOLE_HEADS = "divergence-whole-heads"
"""As `divergence`, without going inside heads; only where it is asked for by name."""
ALL_CRITERIA = (*CRITERIA, WHOLE_HEADS)
BY_DIVERGENCE = (DIVERGENCE, WHOLE_HEADS)
COMPENSATED = (VBP, CORP)
"""Criteria that bring a compensation of their own, the kind "own"."""

ALLOCATIONS = ("local", "global")
OURS = "ours"
"""That of both of these. Older result files also have other criteria in its numbers, and "cost"."""

ORDER = (*ALLOCATIONS, "cost", OURS)

UNTUNED = (
    "plain", "recalibrated", "folded", "folded-recalibrated", "refit", "own",
    "folded-balanced", "folded-recalibrated-balanced", "refit-balanced",
)  # fmt: skip
TUNED = ("plain-tuned", "folded-tuned", "own-tuned")
KINDS = (*UNTUNED, *TUNED)


@dataclass(frozen=True)
class Variant:
    """Who ranks the neurons, and what says how many go of each layer."""

    criterion: str
    allocation: str

    def __str__(self) -> str:
        if self.criterion in BY_DIVERGENCE:
            return self.criterion
        return f"{self.criterion}, {self.allocation}"

    def has(self, kind: str) -> bool:
        """Whether there is such a kind: not every criterion compensates by itself."""
        return "own" not in kind.split("-") or self.criterion in COMPENSATED


def chosen_variants(criteria: Sequence[str], allocations: Sequence[str]) -> Iterator[Variant]:
    """Every criterion with every allocation; `divergence` has its own alone."""
    for criterion in criteria:
        if criterion in BY_DIVERGENCE:
            yield Variant(criterion, OURS)
        else:
            yield from (Variant(criterion, allocation) for allocation in allocations)


@dataclass(frozen=True)
class Measured:
    """What one pruning leaves.

    reached: the share of the budget's cost that it keeps.
    accuracy, dense: shares, 0 to 1; None where the budget is not met; dense is the whole model's.
    class_drop: the largest share of its samples that a class has lost; None if it is not known.
    agreement: share of samples that get the class that the whole model gives; likewise.
    """

    seed: int
    criterion: str
    allocation: str
    level: str
    kind: str
    reached: float
    accuracy: float | None
    dense: float
    class_drop: float | None = None
    agreement: float | None = None

    @property
    def variant(self) -> Variant:
        return Variant(self.criterion, self.allocation)
