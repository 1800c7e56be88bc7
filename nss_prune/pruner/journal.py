"""The steps of a pruner as they are taken: seconds of each stage, and a report of each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from nss_prune.core.timing import call_seconds, stage
from nss_prune.graph.costs import Cost
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
        self._before = Cost(0, 0)
        self._latency = 0.0

    @property
    def total(self) -> Report | None:
        """What all steps did together, or None before the first."""
        return Report.total(self.reports) if self.reports else None

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Time the body as a stage, and log its name."""
        return stage(name, self.seconds)

    def begin(self, subject: Subject) -> None:
        """Count and time the model as a step finds it."""
        self._before = subject.cost()
        with self.stage("timing the model"):
            self._latency = self._call_seconds(subject)

    def end(self, plan: Plan, notes: Sequence[str] = (), *, planned: bool = True) -> Report:
        """Count and time what a step left, and report on it.

        Args:
            notes: Of the repairs.
            planned: Whether all of the plan was carried out; otherwise the layers are looked at.
        """
        subject = plan.subject
        with self.stage("timing the model"):
            latency = self._latency, self._call_seconds(subject)
        rows = report_rows(subject, plan.slice)
        figures = replace(plan.figures, seconds=dict(self.seconds), latency=latency)
        found = (*subject.neurons.notes, *plan.notes, *plan.evidence.notes, *notes)
        report = Report(
            rows if planned else actual_rows(rows, subject.model),
            self._before,
            subject.cost(),
            found,
            figures,
            classes=plan.classes,
        )
        self.seconds.clear()
        self.reports.append(report)
        return report

    @staticmethod
    def _call_seconds(subject: Subject) -> float:
        return call_seconds(subject.model, subject.example_inputs, subject.forward)
