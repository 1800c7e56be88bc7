"""The steps of a pruner as they are taken: seconds of each stage, and a report of each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from nss_prune.core.late_timing import LateSeconds, Skeleton
from nss_prune.core.models import on_one_device
from nss_prune.core.timing import call_seconds, stage
from nss_prune.graph.costs import Cost, macs_without_values, measure, parameters_of
from nss_prune.pruner.plan import Plan
from nss_prune.pruner.report import Report
from nss_prune.pruner.rows import actual_rows, report_rows
from nss_prune.pruner.subject import Subject

__all__ = ["Journal", "Report"]


class Journal:
    """What is known of the steps.

    Attributes:
        seconds: Stage -> seconds, since the last report.
        reports: Of the steps taken.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.reports: list[Report] = []
        self._before: tuple[Cost, float | Skeleton] = Cost(0, 0), 0.0

    @property
    def total(self) -> Report | None:
        """What all steps did together, or None before the first."""
        return Report.total(self.reports) if self.reports else None

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time the body as a stage, and log its name."""
        return stage(name, self.seconds)

    def begin(self, subject: Subject) -> None:
        """Count the model as a step finds it."""
        self._before = self._counted(subject)

    def end(self, plan: Plan, notes: Sequence[str] = (), *, planned: bool = True) -> Report:
        """Count what a step left, and report on it.

        Args:
            notes: Of the repairs.
            planned: Whether all of the plan was carried out; otherwise the layers are looked at.
        """
        subject = plan.subject
        (before, whole), (after, smaller) = self._before, self._counted(subject)
        latency = LateSeconds(whole, smaller)
        rows = report_rows(subject, plan.slice)
        figures = replace(plan.figures, seconds=dict(self.seconds), latency=latency)
        found = (*subject.neurons.notes, *plan.notes, *plan.evidence.notes, *notes)
        report = Report(
            rows if planned else actual_rows(rows, subject.model),
            before,
            after,
            found,
            figures,
            classes=plan.classes,
        )
        self.seconds.clear()
        self.reports.append(report)
        return report

    def _counted(self, subject: Subject) -> tuple[Cost, float | Skeleton]:
        """The cost of a model, and the seconds of a call, or what they can be measured of later."""
        called = subject.example_inputs, subject.forward
        skeleton = Skeleton(subject.model, *called)
        macs = macs_without_values(skeleton.model, *called)
        if macs is not None and on_one_device(subject.model):
            return Cost(parameters_of(subject.model), macs[""]), skeleton
        with self.stage("timing the model"):
            return measure(subject.model, *called), call_seconds(subject.model, *called)
