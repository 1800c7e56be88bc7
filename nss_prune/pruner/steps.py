"""The steps of a pruner: from a plan to a smaller model and its report, or all as it was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from nss_prune.core.models import device_of
from nss_prune.core.thread_state import outside_inference_mode
from nss_prune.errors import GraphError
from nss_prune.pruner.interactive import count_heads, history, not_replayed, pruning_groups
from nss_prune.pruner.journal import Journal, Report
from nss_prune.pruner.plan import Plan
from nss_prune.pruner.stages import Stages
from nss_prune.pruner.state import restored_on_error, share_history, trace_graph, without_graph


class Steps(Stages):
    """Takes the steps.

    Attributes:
        report: What the last step did, or None; of an interactive step once all groups were taken.
        folded: Consumers whose weights the last step changed beyond the removal.
    """

    DG: Any
    model: nn.Module
    current_step: int
    iterative_steps: int
    ignored_layers: list[nn.Module]
    num_heads: dict[nn.Module, int]
    report: Report | None = None
    folded: tuple[str, ...] = ()
    _stale = False

    _history: list[Any]
    _unrecorded: list[str]

    def _begin(self) -> None:
        """Before the first step, once the model is traced."""
        self._history, self._unrecorded = [], []
        self._journal = Journal(device_of(self._subject.model))
        share_history(self)

    def __getstate__(self) -> dict[str, Any]:
        return without_graph(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        trace_graph(self)

    @outside_inference_mode
    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Remove the neurons of this step.

        Args:
            interactive: Yield torch-pruning groups instead, each with the neurons to remove, for
                the caller to ``.prune()``. Nothing is folded, recalibrated, balanced or undone
                then.

        Raises:
            DataError, NumericalError: The data cannot be used.
            GraphError: ``interactive``, and the model could only be traced in parts.
            RemovalError: The smaller model would not work. In every case model and pruner are as
                before.
        """
        if self.current_step >= self.iterative_steps:
            warnings.warn(
                f"all {self.iterative_steps} step(s) are done, nothing was pruned; make a new "
                "pruner, or pass iterative_steps=",
                stacklevel=2,
            )
            return iter(()) if interactive else None
        if interactive and self.DG is None:
            raise GraphError(
                "interactive=True needs torch-pruning's graph of the whole model, which could not "
                f"be built: {self._subject.untraceable}; call step() without it"
            )
        with restored_on_error(self):
            self.current_step += 1
            self._renew()
            self._journal.begin(self._subject)
            if interactive:
                return self._groups(self._verified(inside_heads=False))
            with self._showing():
                plan = self._next()
                unsaid = not_replayed(plan.subject, plan.slice)
                with self._journal.stage("removing"):
                    plan, repaired = self._pruned(plan)
            self._finish(plan, unsaid)
            self.folded = repaired.changed
            self.report = self._journal.end(plan, repaired.notes)
        return None

    def _renew(self) -> None:
        """Trace the model again after an earlier step, and forget what was observed of it."""
        if not self._stale:
            return
        self._subject = self._subject.fresh()
        self.DG = self._subject.graph
        share_history(self)
        self._given = self._profiled = self._evidence = self._plan = None
        self._stale = False

    def _finish(self, plan: Plan, unsaid: Sequence[str]) -> None:
        """Keep what was done, and let what is around the model follow.

        Args:
            unsaid: Groups whose loss torch-pruning's history cannot say.
        """
        self._plan, self._subject, self._whole = plan, plan.subject, plan.whole
        self._stale = True
        self._unrecorded += [name for name in unsaid if name in plan.slice.removed]
        self._history += map(list, history(plan.slice))
        if self._upkeep.checkpoint and self.current_step == self.iterative_steps:
            self._upkeep.checkpoint.clear()
        count_heads(self.num_heads, self.model, plan.slice)

    def _groups(self, plan: Plan) -> Iterator[Any]:
        """torch-pruning's groups of a plan, one by one."""
        self._plan, self._subject, self._whole = plan, plan.subject, plan.whole

        def groups() -> Iterator[Any]:
            self._stale = True
            unsaid = not_replayed(plan.subject, plan.slice)
            self._unrecorded += unsaid
            with self._journal.stage("removing"):
                yield from pruning_groups(plan.subject, plan.slice, self.num_heads, unsaid)
            self.report = self._journal.end(plan, planned=False)

        return groups()

    def pruning_history(self) -> list[Any]:
        """What all steps removed, for ``load_pruning_history`` on a fresh model.

        Raises:
            GraphError: torch-pruning does not follow some of it, such as hidden units.
        """
        if self._unrecorded:
            raise GraphError(
                f"torch-pruning's history does not have what {self._unrecorded[0]} lost; use "
                "nss_prune.save_pruned and load_pruned"
            )
        return list(self._history)
