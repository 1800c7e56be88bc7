"""What a budget is a share of: parameters, multiply-accumulates, latency, or a cost of your own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from nss_prune.allocation.budget import ShareOf, mac_share, parameter_share
from nss_prune.allocation.latency import Latency
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


def everything(subject: Subject) -> Slice:
    """The slice that keeps all neurons."""
    kept = {group.name: torch.ones(group.size, dtype=torch.bool) for group in subject.groups}
    return Slice(kept, subject.groups)


def shares(amount: Callable[[Slice], float], whole: float) -> ShareOf:
    """The cost of a slice as a share of the whole model's."""
    return lambda critical: amount(critical) / whole
