"""What chooses the neurons that stay: the protocol of a strategy, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import nn

from nss_prune.allocation.budget import Limits, ShareOf
from nss_prune.graph.bases import BasisChange
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.pruner.subject import Subject
from nss_prune.statistics.moments import ConsumerStatistics

Importance = Callable[[Any], Any]
"""Function of a torch-pruning group that gives the importance of its channels, or None."""


Score = Callable[[nn.Module], float]
"""Function of a model that says how good it is, larger for better, as on held-out batches."""


Measure = Callable[[Slice], float]
"""Function of a slice that measures it on the data, in all processes."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a strategy observed of a subject; derive from it to keep more.

    Attributes:
        neurons: Those of the subject that can be ranked, and why the others are left alone.
        statistics: Means and covariances of the consumers' inputs, where they were observed as
            well: folding then needs no pass of its own.
        notes: For the report.
        bases: Layer that reads heads -> the coordinates of these in which all this was observed;
            the model gets them before any of its channels are removed.
    """

    neurons: NeuronMap
    statistics: Mapping[str, ConsumerStatistics] | None = None
    notes: tuple[str, ...] = ()
    bases: Mapping[str, tuple[BasisChange, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What is to be left after a step; the pruner's argument decides which of them is not None.

    Attributes:
        theta: The similarity threshold of this step.
        ratio: Share of the neurons that each layer has before this step to keep, in (0, 1].
        budget: Share of the first model's cost to keep, in (0, 1].
        share: What a slice keeps of that cost; where there is a budget. With several budgets it is
            the largest of the shares, each in units of its budget, and ``budget`` is 1. Alone,
            without a budget, it is what is to be least.
    """

    theta: float | None = None
    ratio: float | None = None
    budget: float | None = None
    share: ShareOf | None = None


Observed = TypeVar("Observed", bound=Evidence)


class Observer(Protocol):
    """Observes a model: the part of a strategy that takes passes over the data."""

    def observe(self, subject: Subject) -> Any:
        """What is seen, an :class:`Evidence`; the model is left as found."""
        ...


class Strategy(Protocol[Observed]):
    """Observes a model, and selects the neurons that stay.

    Give an object of your own as ``strategy=``, with a ratio or a budget::

        class LargestWeights:
            def observe(self, subject):
                return Evidence(neurons=subject.neurons)

            def select(self, subject, evidence, target, limits):
                kept = {}
                for group in subject.groups:
                    sizes = subject.model.get_submodule(group.name).weight.flatten(1).norm(dim=1)
                    count = limits.kept(group.name, group.size, round(target.ratio * group.size))
                    kept[group.name] = torch.zeros(group.size, dtype=torch.bool)
                    kept[group.name][sizes.argsort(descending=True)[:count]] = True
                return Slice(kept, subject.groups)
    """

    def observe(self, subject: Subject) -> Observed:
        """All that takes passes over the data, once a step; the model is left as found."""
        ...

    def select(self, subject: Subject, evidence: Observed, target: Target, limits: Limits) -> Slice:
        """The neurons that stay, of all of ``subject.groups``.

        Of several processes the first is asked, and all follow it.

        Args:
            subject: With the neurons of the evidence, or fewer where some cannot be removed.
            evidence: By :meth:`observe`, of the same model.
            target: What is to be left.
            limits: What must be kept in any case.
        """
        ...
