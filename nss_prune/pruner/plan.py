"""What a step is going to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from nss_prune.graph.bases import BasisChange, change_basis
from nss_prune.graph.slices import Slice
from nss_prune.pruner.figures import Figures
from nss_prune.pruner.sensitivity import SensitivityTable
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject


@dataclass(frozen=True)
class Plan:
    """What a step is going to do.

    Attributes:
        subject: With the neurons that are known to be removable.
        evidence: What the strategy observed of it.
        slice: What is to stay.
        whole: The first model's costs, where there are budgets or a quality.
        notes: What the slice falls short of.
        figures: What the evidence says of the slice.
        classes: Class -> output, where the smaller model is for some of them.
        sensitivity: Of the layers, where it was predicted.
    """

    subject: Subject
    evidence: Evidence
    slice: Slice
    whole: tuple[float, ...]
    notes: tuple[str, ...]
    figures: Figures = field(default_factory=Figures)
    classes: Mapping[int, int] = field(default_factory=dict)
    sensitivity: SensitivityTable | None = None


@dataclass(frozen=True)
class Decision:
    """What the first of several processes decides for all.

    Attributes:
        kept: Layer -> True where a neuron stays, ``[neurons]``.
        rule: By which the slice was chosen.
        whole, notes, sensitivity: Those of the plan.
        reached: Name of the cost that is limited, and the share of it that is kept.
    """

    kept: dict[str, Tensor]
    rule: str
    whole: tuple[float, ...]
    notes: tuple[str, ...]
    reached: tuple[str, float | None] = ("", None)
    sensitivity: SensitivityTable | None = None


def to_bases_of(
    model: nn.Module, chosen: Slice, bases: Mapping[str, tuple[BasisChange, ...]]
) -> None:
    """Give the heads of which something goes the coordinates that it goes in."""
    change_basis(model, bases_of(chosen, bases))


def bases_of(
    chosen: Slice, bases: Mapping[str, tuple[BasisChange, ...]]
) -> tuple[BasisChange, ...]:
    """The coordinates that count: those of heads of which something goes."""
    losing = chosen.removed_channels() if bases else {}
    return tuple(
        change
        for consumer, changes in bases.items()
        if (consumer, "in") in losing
        for change in changes
    )
