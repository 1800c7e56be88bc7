"""What a budget is a share of: parameters, multiply-accumulates, latency, or a cost of your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from nss_prune.allocation.budget import ShareOf, mac_share, parameter_share
from nss_prune.allocation.latency import Latency
from nss_prune.errors import ArgumentError
from nss_prune.graph.slices import Slice
from nss_prune.pruner.subject import Subject


class Cost(Protocol):
    """What a model costs, in any unit, with only the neurons of a slice.

    Give an object of your own as ``cost=``, with ``budget=`` as the share of it to keep::

        class Activations:
            name = "activations"

            def of(self, subject):
                return lambda critical: sum(int(kept.sum()) for kept in critical.kept.values())

    Attributes:
        name: In the report: "50 % of the <name> are kept".
    """

    name: str

    def of(self, subject: Subject) -> Callable[[Slice], float]:
        """The cost of what a slice of ``subject.groups`` keeps; it is called some hundred times.

        It must not rise where a slice keeps less.
        """
        ...


class Parameters:
    """The number of parameters."""

    name = "parameters"

    def of(self, subject: Subject) -> Callable[[Slice], float]:
        """Counted from the shapes."""
        return parameter_share(subject.groups, subject.model, 1)


class MACs:
    """Multiply-accumulates of one call with the example inputs."""

    name = "MACs"

    def of(self, subject: Subject) -> Callable[[Slice], float]:
        """Counted by hooks in one call."""
        return mac_share(subject.groups, subject.model, 1, subject.example_inputs, subject.forward)


class CallLatency:
    """Seconds of one call with the example inputs, predicted from timings at four widths."""

    name = "latency"

    def of(self, subject: Subject) -> Callable[[Slice], float]:
        """See :mod:`nss_prune.allocation.latency`."""
        return Latency(
            subject.groups,
            subject.model,
            subject.example_inputs,
            subject.remove,
            subject.forward,
        ).seconds


CostSpec = str | Cost | Callable[[Slice], float]
"""What ``cost=`` may be: "macs", "parameters" or "latency", an object, or a function of a slice."""


class _OfSlice:
    """A function of a slice as a cost."""

    def __init__(self, function: Callable[[Slice], float]) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def of(self, subject: Subject) -> Callable[[Slice], float]:
        """The function itself."""
        return self._function


COSTS: dict[str, type[Cost]] = {"macs": MACs, "parameters": Parameters, "latency": CallLatency}


def cost_named(cost: CostSpec) -> Cost:
    """A cost by its name, of an object, or of a function of the slice that is kept.

    Raises:
        ArgumentError: It is none of these.
    """
    if isinstance(cost, str) and cost in COSTS:
        return COSTS[cost]()
    if hasattr(cost, "of") and hasattr(cost, "name"):
        return cost
    if callable(cost):
        return _OfSlice(cost)
    raise ArgumentError(
        f"cost is {cost!r}; use one of {tuple(COSTS)}, a function of the slice that is kept, or an "
        "object as nss_prune.pruner.cost.Cost says"
    )


def largest(shares: Sequence[ShareOf], budgets: Sequence[float]) -> ShareOf:
    """Of several costs, the share that exceeds its budget most, in units of the budget."""
    pairs = list(zip(shares, budgets, strict=True))
    return lambda critical: max(share(critical) / budget for share, budget in pairs)


def everything(subject: Subject) -> Slice:
    """The slice that keeps all neurons."""
    kept = {group.name: torch.ones(group.size, dtype=torch.bool) for group in subject.groups}
    return Slice(kept, subject.groups)


def shares(amount: Callable[[Slice], float], whole: float) -> ShareOf:
    """The cost of a slice as a share of the whole model's."""
    return lambda critical: amount(critical) / whole
