"""What a step is going to do, and what is said where it falls short."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from nss_prune.allocation.budget import FLOOR, TOLERANCE, Limits, ShareOf
from nss_prune.core.processes import decided
from nss_prune.graph.bases import BasisChange
from nss_prune.graph.groups import MAKES_THE_OUTPUT
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.norms import least_neurons
from nss_prune.graph.slices import Slice
from nss_prune.pruner.arguments import Aim
from nss_prune.pruner.classes import ClassHead
from nss_prune.pruner.cost import everything, largest, shares
from nss_prune.pruner.eliminating import EliminationEvidence
from nss_prune.pruner.figures import Figures
from nss_prune.pruner.plan_figures import figures_of
from nss_prune.pruner.rounding import RoundTo, roundings
from nss_prune.pruner.schedule import Schedule as Schedule
from nss_prune.pruner.schedule import schedule as schedule
from nss_prune.pruner.schedule import showing as showing
from nss_prune.pruner.sensitivity import SensitivityTable, sensitivity_of
from nss_prune.pruner.strategy import Evidence, Strategy, Target
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


@dataclass(frozen=True)
class Planner:
    """Selects what stays.

    Attributes:
        strategy: Chooses the neurons.
        aim: How much is to go over all steps.
        first_sizes: Layer -> neurons before the first step.
        max_pruning_ratio: Share of the neurons that a layer may lose over all steps.
        round_to: Neurons are kept in multiples of this; "auto" for as coarse as the budget allows,
            see :mod:`nss_prune.pruner.rounding`.
        uniform: Whether the ratio is that of every layer and of every step in equal parts.
        head: Where the class scores are made, where the smaller model is for some classes.
    """

    strategy: Strategy[Any]
    aim: Aim
    first_sizes: Mapping[str, int]
    max_pruning_ratio: float
    round_to: RoundTo
    uniform: bool = True
    head: ClassHead | None = None

    def plan(
        self,
        subject: Subject,
        evidence: Evidence,
        step: int,
        steps: int,
        whole: tuple[float, ...] = (),
    ) -> Plan:
        """The plan of a step.

        Args:
            subject: With the neurons of the evidence, or fewer.
            step: From 1 to ``steps``.
            whole: The first model's costs; counted here where there are none.
        """
        decision = decided(lambda: self._decision(subject, evidence, step, steps, whole))
        chosen = Slice(decision.kept, subject.groups, decision.rule)
        chosen = replace(chosen, bases=bases_of(chosen, evidence.bases))
        notes, classes = decision.notes, {}
        if self.head is not None:
            notes, classes = (*notes, self.head.note), dict(self.head.outputs)
        figures = figures_of(evidence, chosen, decision.sensitivity, *decision.reached)
        return Plan(
            subject, evidence, chosen, decision.whole, notes, figures, classes, decision.sensitivity
        )

    def _decision(
        self,
        subject: Subject,
        evidence: Evidence,
        step: int,
        steps: int,
        whole: tuple[float, ...],
    ) -> Decision:
        """What the first of several processes decides."""
        whole, kept = self._shares(subject, whole)
        target = self._target(step, steps, kept)
        chosen, limits = self._selected(subject, evidence, target)
        notes = self._shortfall(subject, chosen, kept, step, steps)
        if not kept:
            return Decision(dict(chosen.kept), chosen.rule, whole, notes)
        share, cost = kept[0], self.aim.costs[0].name
        sensitivity = None
        if isinstance(evidence, EliminationEvidence):
            sensitivity = sensitivity_of(evidence, chosen, share, cost, limits)
        reached = cost, share(chosen)
        return Decision(dict(chosen.kept), chosen.rule, whole, notes, reached, sensitivity)

    def _selected(
        self, subject: Subject, evidence: Evidence, target: Target
    ) -> tuple[Slice, Limits]:
        """What stays, with the coarsest rounding that meets the budget, and within which limits."""
        found: list[tuple[Slice, Limits]] = []
        plain = self._limits(subject)
        for limits in roundings(
            plain, self.round_to, subject.groups, self.first_sizes, subject.model
        ):
            found.append((self.strategy.select(subject, evidence, target, limits), limits))
            if target.budget is None or target.share is None:
                break
            if abs(target.share(found[-1][0]) - target.budget) <= TOLERANCE:
                return found[-1]
        # Where none meets the budget, rounding is not why: the coarsest that is within it.
        within = [
            one for one in found if target.share is None or target.share(one[0]) <= _most(target)
        ]
        return within[0] if within else found[-1]

    def _shares(
        self, subject: Subject, whole: tuple[float, ...]
    ) -> tuple[tuple[float, ...], list[ShareOf]]:
        """The first model's costs, and what a slice keeps of each."""
        amounts = [cost.of(subject) for cost in self.aim.costs]
        whole = whole or tuple(amount(everything(subject)) for amount in amounts)
        if self.head is not None:
            with self.head.dropped(subject.model):
                amounts = [cost.of(subject) for cost in self.aim.costs]
        return whole, [shares(amount, first) for amount, first in zip(amounts, whole, strict=True)]

    def _shortfall(
        self, subject: Subject, chosen: Slice, kept: Sequence[ShareOf], step: int, steps: int
    ) -> tuple[str, ...]:
        """What the report says about the size."""
        pairs = zip(self.aim.costs, kept, strict=True)
        reached = [(cost.name, share(chosen)) for cost, share in pairs]
        if self.aim.quality is not None:
            of = ", ".join(f"{share:.1%} of the {name}" for name, share in reached)
            return (f"{of} are kept, by {chosen.rule}",)
        if self.aim.budgets:
            return budgets_shortfall(reached, self._budgets(step, steps))
        if self.aim.ratio is None or not self.uniform:
            return ()
        return ratio_shortfall(subject, chosen, self.aim.ratio * step / steps, self.first_sizes)

    def _budgets(self, step: int, steps: int) -> list[float]:
        """The shares of the first model to keep after a step."""
        return [1 - (1 - budget) * step / steps for budget in self.aim.budgets]

    def _target(self, step: int, steps: int, kept: Sequence[ShareOf]) -> Target:
        aim, done = self.aim, step / steps
        if aim.theta is not None:
            return Target(theta=1 - (1 - aim.theta) * done)
        if aim.quality is not None:
            return Target(share=kept[0])
        if len(kept) > 1:
            return Target(budget=1.0, share=largest(kept, self._budgets(step, steps)))
        if kept:
            return Target(budget=self._budgets(step, steps)[0], share=kept[0])
        assert aim.ratio is not None
        # A layer has lost its share of the earlier steps; the ratio is of its first size.
        left = 1 - aim.ratio * (done - 1 / steps)
        return Target(ratio=(1 - aim.ratio * done) / left)

    def _limits(self, subject: Subject) -> Limits:
        sizes = self.first_sizes
        share = 1 - self.max_pruning_ratio
        least = {name: math.ceil(size * share - 1e-9) for name, size in sizes.items()}
        for group in subject.groups:
            few = least_neurons(group, subject.model)
            least[group.name] = max(few, least.get(group.name, 1))
        heads = (
            group.name
            for group in subject.groups
            if not group.has_channels and not group.is_inside_heads
        )
        floor = {name: math.ceil(size * FLOOR) for name, size in sizes.items()}
        return Limits(least, 1, frozenset(heads), floor)


def _most(target: Target) -> float:
    return 1.0 if target.budget is None else target.budget + TOLERANCE


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


def budgets_shortfall(
    reached: Sequence[tuple[str, float]], budgets: Sequence[float]
) -> tuple[str, ...]:
    """What the report says about budgets of which one is not met, or all could be smaller.

    Args:
        reached: Kind of cost, and the share of it that is kept.
    """
    pairs = list(zip(reached, budgets, strict=True))
    binding = max(share - wanted for (_, share), wanted in pairs)
    return tuple(
        note
        for (kind, share), wanted in pairs
        if share > wanted or share - wanted == binding
        for note in budget_shortfall(kind, wanted, share)
    )


def budget_shortfall(kind: str, wanted: float, reached: float) -> tuple[str, ...]:
    """What the report says about a budget that is not met, in zero or one lines."""
    if abs(reached - wanted) <= TOLERANCE:
        return ()
    why = (
        "all neurons that may go are gone, a tenth of each layer stays; the layers left alone, "
        "the limits and the rest of the model take more"
        if reached > wanted
        else "one more neuron, or the next multiple of round_to, would go beyond it"
    )
    return (f"{reached:.1%} of the {kind} are kept, the budget is {wanted:.1%}: {why}",)


def ratio_shortfall(
    subject: Subject, chosen: Slice, ratio: float, first_sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """What the report says about a ratio that is not met, in zero or one lines.

    Args:
        ratio: Share of the channels of all layers to remove up to this step.
        first_sizes: Layer -> neurons before the first step.
    """
    left_alone = {
        name: size
        for name, size in subject.neurons.left_alone_sizes.items()
        if subject.neurons.left_alone[name] not in (MAKES_THE_OUTPUT, "ignored")
    }
    whole = kept = sum(left_alone.values())
    for group in subject.groups:
        channels = _channels_of_neuron(group)
        whole += channels * first_sizes.get(group.name, group.size)
        kept += channels * int(chosen.kept[group.name].sum())
    gone = 1 - kept / whole if whole else ratio
    if ratio - gone <= TOLERANCE:
        return ()
    heads = [group.name for group in subject.groups if not group.has_channels]
    reasons = [
        *([f"heads go whole, with prune_num_heads ({_some(heads)})"] if heads else []),
        *([f"left alone are {_some(list(left_alone))}"] if left_alone else []),
    ]
    why = "; ".join(reasons) or "the limits, or the union over categories, keep more"
    return (f"{gone:.1%} of the channels are removed, pruning_ratio asks for {ratio:.1%}: {why}",)


def _channels_of_neuron(group: NeuronGroup) -> int:
    """Channels of the root layer in each neuron."""
    if group.has_channels:
        return group.ties
    root = next(member for member in group.members if member.name == group.name)
    return len(root.channels) // group.size


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
