"""What a smaller model gets back: the protocol of a repair around a removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from nss_prune.graph.slices import Slice
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        notes: For the report.
        changed: Layers whose weights are others than the removal alone would have left.
    """

    notes: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


class Repair(Protocol):
    """Makes up for the neurons that a step removes, before and after they go.

    What it changes it must replace by new tensors and never write into, so that the model can be
    put back on an error. Give objects of your own as ``repairs=``; they come after the pruner's
    own::

        class LargerScores:
            def observe(self, subject, evidence):
                return None

            def before(self, subject, chosen, seen):
                return Repaired()

            def after(self, subject, chosen, seen):
                head = subject.model[-1]
                head.weight = nn.Parameter(2 * head.weight.detach())
                return Repaired(("the scores are doubled",))
    """

    def observe(self, subject: Subject, evidence: Evidence) -> Any:
        """What must be known of the model before anything changes; it is left as found."""
        ...

    def before(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Change the model while it still has all neurons; ``seen`` is what was observed."""
        ...

    def after(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Change the smaller model; the example inputs are those of ``subject``."""
        ...
