"""The repair of the class scores: balance of classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nss_prune.compensation.balance import ClassShares, balance, class_shares
from nss_prune.core.outputs import Outputs, OutputsSpec
from nss_prune.graph.slices import Slice
from nss_prune.pruner.meaning import outputs_for
from nss_prune.pruner.repair import Repaired
from nss_prune.pruner.schedule import FORWARD, Stage
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import DEFAULT, Records, Upkeep


@dataclass
class Balance:
    """Shifts the class scores to the probabilities that the first model gave each class.

    See :mod:`nss_prune.compensation.balance`.

    Attributes:
        data: Batches that can be iterated again.
        upkeep: What the passes may take, keep and show.
        outputs: What the outputs mean, see :data:`nss_prune.core.outputs.OutputsSpec`.
    """

    data: Iterable[Any]
    upkeep: Upkeep = DEFAULT
    outputs: OutputsSpec = None
    _meaning: Outputs | None = None
    _whole: ClassShares | None = None

    def observe(self, subject: Subject, evidence: Evidence) -> ClassShares:
        """What the model gives each class before the first removal."""
        if self._whole is None:
            self._meaning, _ = outputs_for(subject, self.data, self.outputs)
            asked, kinds = self._meaning.describe(), {"shares": ClassShares}
            make = partial(self._seen, subject)
            found = self.upkeep.recalled("classes", subject.model, self.data, asked, kinds, make)
            self._whole = found["shares"][""]
        assert self._whole is not None
        return self._whole

    def stages(self, subject: Subject, before: Sequence[Stage]) -> list[Stage]:
        """A pass before the removal, and one after it."""
        return [Stage("balance", 2, FORWARD)]

    def _seen(self, subject: Subject) -> Records:
        found = class_shares(
            subject.model,
            self.data,
            progress=self.upkeep.progress,
            outputs=self._meaning,
            **subject.calling,
        )
        return {"shares": {"": found}}

    def before(self, subject: Subject, chosen: Slice, seen: Any) -> Repaired:
        """Nothing yet."""
        return Repaired()

    def after(self, subject: Subject, chosen: Slice, seen: ClassShares) -> Repaired:
        """Balance, where that helps."""
        balanced = balance(
            subject.model,
            self.data,
            seen,
            progress=self.upkeep.progress,
            outputs=self._meaning,
            **subject.calling,
        )
        return Repaired((balanced.note,) if balanced.note else ())
