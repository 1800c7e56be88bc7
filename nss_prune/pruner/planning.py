"""What a step is going to do, and what is said where it falls short."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nss_prune.allocation.budget import FLOOR, TOLERANCE, Limits
from nss_prune.core.processes import decided
from nss_prune.graph.groups import MAKES_THE_OUTPUT
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.norms import least_neurons
from nss_prune.graph.slices import Slice
from nss_prune.pruner.arguments import Aim
from nss_prune.pruner.cost import everything, shares
from nss_prune.pruner.schedule import Schedule as Schedule
from nss_prune.pruner.schedule import schedule as schedule
from nss_prune.pruner.schedule import showing as showing
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
        uniform: Whether the ratio is that of every layer and of every step in equal parts.
    """

    strategy: Strategy[Any]
    aim: Aim
    first_sizes: Mapping[str, int]
    max_pruning_ratio: float
    round_to: int | None
    uniform: bool = True

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
        kept, whole, notes = decided(lambda: self._decision(subject, evidence, step, steps, whole))
        return Plan(subject, evidence, Slice(kept, subject.groups), whole, notes)

    def _decision(
        self, subject: Subject, evidence: Evidence, step: int, steps: int, whole: float | None
    ) -> tuple[dict[str, Tensor], float | None, tuple[str, ...]]:
        """What stays, the first model's cost, and the notes: by the first of several processes."""
        share = None
        if self.aim.cost is not None:
            amount = self.aim.cost.of(subject)
            whole = amount(everything(subject)) if whole is None else whole
            share = shares(amount, whole)
        target = self._target(step, steps, share)
        chosen = self.strategy.select(subject, evidence, target, self._limits(subject))
        notes: tuple[str, ...] = ()
        if target.budget is not None and target.share is not None:
            assert self.aim.cost is not None
            notes = budget_shortfall(self.aim.cost.name, target.budget, target.share(chosen))
        elif self.aim.ratio is not None and self.uniform:
            notes = ratio_shortfall(
                subject, chosen, self.aim.ratio * step / steps, self.first_sizes
            )
        return dict(chosen.kept), whole, notes

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
        sizes = self.first_sizes
        share = 1 - self.max_pruning_ratio
        least = {name: math.ceil(size * share - 1e-9) for name, size in sizes.items()}
        for group in subject.groups:
            few = least_neurons(group, subject.model)
            least[group.name] = max(few, least.get(group.name, 1))
        heads = (group.name for group in subject.groups if not group.has_channels)
        floor = {name: math.ceil(size * FLOOR) for name, size in sizes.items()}
        return Limits(least, self.round_to or 1, frozenset(heads), floor)


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
