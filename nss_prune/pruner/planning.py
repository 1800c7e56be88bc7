"""From what a strategy observed to what a step is going to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from nss_prune.allocation.budget import TOLERANCE, Limits, ShareOf
from nss_prune.core.processes import decided, led
from nss_prune.graph.slices import Slice
from nss_prune.pruner.arguments import Aim
from nss_prune.pruner.classes import ClassHead
from nss_prune.pruner.cost import everything, largest, shares
from nss_prune.pruner.limits import RoundTo, limits_of
from nss_prune.pruner.plan import Decision, Plan, bases_of
from nss_prune.pruner.plan_figures import figures_of, predicted_sensitivity
from nss_prune.pruner.shortfall import budgets_shortfall, ratio_shortfall
from nss_prune.pruner.strategy import Evidence, Measure, Strategy, Target
from nss_prune.pruner.subject import Subject


@dataclass(frozen=True)
class Planner:
    """Selects what stays.

    Attributes:
        strategy: Chooses the neurons.
        aim: How much is to go over all steps.
        first_sizes: Layer -> neurons before the first step.
        max_pruning_ratio: Share of the neurons that a layer may lose over all steps.
        round_to: Neurons are kept in multiples of this; "auto" for as coarse as the budget allows,
            see :mod:`nss_prune.pruner.limits`.
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
        decide = partial(self._decision, subject, evidence, step, steps, whole)
        decision = self._decided(decide, subject, evidence)
        chosen = Slice(decision.kept, subject.groups, decision.rule)
        chosen = replace(chosen, bases=bases_of(chosen, evidence.bases))
        notes, classes = decision.notes, {}
        if self.head is not None:
            notes, classes = (*notes, self.head.note), dict(self.head.outputs)
        figures = figures_of(evidence, chosen, decision.sensitivity, *decision.reached)
        return Plan(
            subject, evidence, chosen, decision.whole, notes, figures, classes, decision.sensitivity
        )

    def _decided(
        self, decide: Callable[[Callable[..., Slice]], Decision], subject: Subject, evidence: Any
    ) -> Decision:
        """What the first process decides, where all measure the slices that it tries."""
        select: Callable[..., Slice] = self.strategy.select
        measuring = getattr(self.strategy, "measuring", None)
        measure: Measure | None = None if measuring is None else measuring(subject, evidence)
        if measure is None:
            return decided(lambda: decide(select))
        return led(lambda ask: decide(partial(select, measure=ask)), measure)

    def _decision(
        self,
        subject: Subject,
        evidence: Evidence,
        step: int,
        steps: int,
        whole: tuple[float, ...],
        select: Callable[..., Slice],
    ) -> Decision:
        """What the first of several processes decides."""
        whole, kept = self._shares(subject, whole)
        target = self._target(step, steps, kept)
        chosen, limits = self._selected(subject, evidence, target, select)
        notes = self._shortfall(subject, chosen, kept, step, steps)
        if not kept:
            return Decision(dict(chosen.kept), chosen.rule, whole, notes)
        share, cost = kept[0], self.aim.costs[0].name
        sensitivity = predicted_sensitivity(evidence, chosen, share, cost, limits)
        reached = cost, share(chosen)
        return Decision(dict(chosen.kept), chosen.rule, whole, notes, reached, sensitivity)

    def _selected(
        self,
        subject: Subject,
        evidence: Evidence,
        target: Target,
        select: Callable[..., Slice],
    ) -> tuple[Slice, Limits]:
        """What stays, with the coarsest rounding that meets the budget, and within which limits."""
        found: list[tuple[Slice, Limits]] = []
        given = self.first_sizes, self.max_pruning_ratio, self.round_to
        for limits in limits_of(subject, *given):
            found.append((select(subject, evidence, target, limits), limits))
            if target.budget is None or target.share is None:
                break
            if abs(target.share(found[-1][0]) - target.budget) <= TOLERANCE:
                return found[-1]
        if target.budget is None or target.share is None:
            return found[-1]
        return _nearest(found, target.budget, target.share)

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


def _nearest(
    found: Sequence[tuple[Slice, Limits]], budget: float, share: ShareOf
) -> tuple[Slice, Limits]:
    """Of slices that all miss the budget, the coarsest as near to it from below as any is."""
    kept = [share(chosen) for chosen, _ in found]
    below = [each for each in kept if each <= budget + TOLERANCE]
    if not below:
        return found[-1]
    near = max(below) - TOLERANCE
    return next(one for one, each in zip(found, kept, strict=True) if near <= each <= max(below))
