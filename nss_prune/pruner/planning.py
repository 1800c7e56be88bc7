"""What a step is going to do, and what is said where it falls short."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nss_prune.allocation.budget import TOLERANCE, Limits
from nss_prune.graph.slices import Slice
from nss_prune.pruner.arguments import Aim
from nss_prune.pruner.cost import everything, shares
from nss_prune.pruner.strategy import Evidence, Strategy, Target
from nss_prune.pruner.subject import Subject


@dataclass(frozen=True)
class Plan:
    """What a step is going to do.

    Attributes:
        subject: With the neurons that are known to be removable.
        evidence: What the strategy observed of it.
        slice: What is to stay.
        whole: The first model's cost, where there is a budget.
        notes: What the slice falls short of.
    """

    subject: Subject
    evidence: Evidence
    slice: Slice
    whole: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Planner:
    """Selects what stays.

    Attributes:
        strategy: Chooses the neurons.
        aim: How much is to go over all steps.
        first_sizes: Layer -> neurons before the first step.
        max_pruning_ratio: Share of the neurons that a layer may lose over all steps.
        round_to: Neurons are kept in multiples of this.
    """

    strategy: Strategy[Any]
    aim: Aim
    first_sizes: Mapping[str, int]
    max_pruning_ratio: float
    round_to: int | None

    def plan(
        self,
        subject: Subject,
        evidence: Evidence,
        step: int,
        steps: int,
        whole: float | None = None,
    ) -> Plan:
        """The plan of a step.

        Args:
            subject: With the neurons of the evidence, or fewer.
            step: From 1 to ``steps``.
            whole: The first model's cost; counted here where it is None.
        """
        share = None
        if self.aim.cost is not None:
            amount = self.aim.cost.of(subject)
            whole = amount(everything(subject)) if whole is None else whole
            share = shares(amount, whole)
        target = self._target(step, steps, share)
        chosen = self.strategy.select(subject, evidence, target, self._limits(subject))
        return Plan(subject, evidence, chosen, whole, self._shortfall(subject, chosen, target))

    def _target(self, step: int, steps: int, share: Any) -> Target:
        aim, done = self.aim, step / steps
        if aim.theta is not None:
            return Target(theta=1 - (1 - aim.theta) * done)
        if aim.budget is not None:
            return Target(budget=1 - (1 - aim.budget) * done, share=share)
        assert aim.ratio is not None
        # A layer has lost its share of the earlier steps; the ratio is of its first size.
        left = 1 - aim.ratio * (done - 1 / steps)
        return Target(ratio=(1 - aim.ratio * done) / left)

    def _limits(self, subject: Subject) -> Limits:
        least = {
            name: math.ceil(size * (1 - self.max_pruning_ratio) - 1e-9)
            for name, size in self.first_sizes.items()
        }
        heads = (group.name for group in subject.groups if not group.has_channels)
        return Limits(least, self.round_to or 1, frozenset(heads))

    def _shortfall(self, subject: Subject, chosen: Slice, target: Target) -> tuple[str, ...]:
        if target.budget is not None and target.share is not None:
            assert self.aim.cost is not None
            reached = target.share(chosen)
            return budget_shortfall(self.aim.cost.name, target.budget, reached)
        return ()


def budget_shortfall(kind: str, wanted: float, reached: float) -> tuple[str, ...]:
    """What the report says about a budget that is not met, in zero or one lines."""
    if abs(reached - wanted) <= TOLERANCE:
        return ()
    why = (
        "all neurons that may go are gone; those of the layers left alone, the limits and the "
        "rest of the model take more"
        if reached > wanted
        else "one more neuron, or the next multiple of round_to, would go beyond it"
    )
    return (f"{reached:.1%} of the {kind} are kept, the budget is {wanted:.1%}: {why}",)
