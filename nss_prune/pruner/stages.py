"""What a pruner knows before a step and after it, each observed or planned on first use."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from nss_prune.errors import RemovalError
from nss_prune.pruner.assembly import is_by_profile, observed
from nss_prune.pruner.execution import carry_out
from nss_prune.pruner.journal import Journal, Report
from nss_prune.pruner.observation import Profiling
from nss_prune.pruner.plan import Plan
from nss_prune.pruner.planning import Planner
from nss_prune.pruner.schedule import Schedule, schedule, showing
from nss_prune.pruner.sensitivity import SensitivityTable
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.types import NeuronMap, Profile, Repair, Slice, Strategy
from nss_prune.pruner.upkeep import Upkeep


class Stages:
    """What a pruner's step is made of."""

    current_step: int
    iterative_steps: int
    repairs: tuple[Repair, ...]
    wrapper: nn.Module | None
    _journal: Journal
    _planner: Planner
    _profiling: Profiling
    _strategy: Strategy[Any]
    _subject: Subject
    _upkeep: Upkeep
    _plan: Plan | None = None
    _whole: tuple[float, ...] = ()
    _given: Any = None
    _profiled: Any = None
    _evidence: Any = None

    @property
    def neurons(self) -> NeuronMap:
        """The neurons of the next step, or of the last one once it is taken."""
        return self._subject.neurons

    @property
    def profile(self) -> Profile:
        """The profile of the model, made on first use, and anew for every further step."""
        if self._profiled is None:
            by_profile = is_by_profile(self._strategy)
            self._profiled = (
                self.evidence if by_profile else observed(self._profiling, self._subject, None)
            )
        profile: Profile = self._profiled.profile
        return profile

    @property
    def evidence(self) -> Any:
        """What the strategy observed, made on first use, and anew for every further step."""
        if self._evidence is None:
            with self._journal.stage("measuring"):
                self._evidence = observed(self._strategy, self._subject, self._given)
        return self._evidence

    @property
    def slice(self) -> Slice:
        """The critical neurons: what the next step keeps, or what the last one kept."""
        return self._next().slice

    @property
    def sensitivity(self) -> SensitivityTable | None:
        """Predicted divergence by layer and by size; None where nothing predicts it."""
        return self._next().sensitivity

    def _next(self) -> Plan:
        """The plan of the next step, or that of the last one once it is taken."""
        if self._plan is None:
            self._plan = self._planned(self._subject.on(self.evidence.neurons))
        return self._plan

    def _planned(self, subject: Subject) -> Plan:
        step, steps, evidence = max(self.current_step, 1), self.iterative_steps, self.evidence
        with self._journal.stage("selecting"):
            return self._planner.plan(subject, evidence, step, steps, self._whole)

    def _pruned(self, plan: Plan) -> tuple[Plan, Any]:
        """Carry the plan out; where that fails, the groups to blame are left alone."""
        try:
            return plan, carry_out(plan, self.repairs, self.wrapper)
        except RemovalError:
            verified = self._verified()
            if len(verified.subject.groups) == len(plan.subject.groups):
                raise
            return verified, carry_out(verified, self.repairs, self.wrapper)

    def _verified(self, inside_heads: bool = True) -> Plan:
        """The plan without the groups whose removal fails on trial."""
        neurons = self.evidence.neurons
        neurons = neurons if inside_heads else neurons.without_inside_heads()
        return self._planned(self._subject.on(neurons).verified())

    @property
    def cumulative_report(self) -> Report | None:
        """What all steps did together, or None before the first."""
        return self._journal.total

    def plan(self) -> Schedule:
        """The passes of the next step, with seconds by one timed batch; nothing is changed."""
        return schedule(self._strategy, self.repairs, self._subject, self._profiling.data)

    def _showing(self) -> AbstractContextManager[None]:
        """One progress bar over the passes of a step."""
        return showing(self._strategy, self.repairs, self._subject, self._upkeep.progress)
