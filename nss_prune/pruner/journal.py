"""The steps of a pruner as they are taken: seconds and memory of each stage, a report of each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nss_prune.core.late_timing import LateSeconds, MetaCopy
from nss_prune.core.memory import peak_memory
from nss_prune.core.models import Forward, on_one_device
from nss_prune.core.timing import call_seconds, stage
from nss_prune.graph.costs import (
    Cost,
    LateCost,
    macs_by_module,
    macs_without_values,
    measure,
    parameters_of,
)
from nss_prune.pruner.plan import Plan
from nss_prune.pruner.report import Report
from nss_prune.pruner.rows import actual_rows, report_rows
from nss_prune.pruner.subject import Subject

__all__ = ["Journal", "Report"]


class Journal:
    """What is known of the steps.

    Args:
        device: Where the model is.

    Attributes:
        seconds: Stage -> seconds, since the last report.
        memory: Stage -> bytes by which it raised the peak, since the last report.
        reports: Of the steps taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.reports: list[Report] = []
        self._before: tuple[Cost, float | MetaCopy] = Cost(0, 0), 0.0

    @property
    def total(self) -> Report | None:
        """What all steps did together, or None before the first."""
        return Report.total(self.reports) if self.reports else None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as a stage, see what memory it takes, and log its name."""
        before = peak_memory(self.device)
        with stage(name, self.seconds):
            yield
        after = peak_memory(self.device)
        if before is not None and after is not None:
            self.memory[name] = self.memory.get(name, 0) + max(after - before, 0)

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
        spent: dict[str, Any] = {"seconds": dict(self.seconds), "memory": dict(self.memory)}
        figures = replace(plan.figures, **spent, latency=latency)
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
        self.memory.clear()
        self.reports.append(report)
        return report

    def _counted(self, subject: Subject) -> tuple[Cost, float | MetaCopy]:
        """The cost of a model, and the seconds of a call, or what they can be measured of later."""
        called = subject.example_inputs, subject.forward
        copy = MetaCopy(subject.model, *called)
        if not subject.reads_values and on_one_device(subject.model):
            return LateCost(parameters_of(subject.model), partial(_macs, copy, *called)), copy
        macs = macs_without_values(copy.model, *called)
        if macs is not None and on_one_device(subject.model):
            return Cost(parameters_of(subject.model), macs[""]), copy
        with self.stage("timing the model"):
            return measure(subject.model, *called), call_seconds(subject.model, *called)


def _macs(copy: MetaCopy, example_inputs: Any, forward: Forward) -> int:
    """Of a call of what was copied."""
    found = macs_without_values(copy.model, example_inputs, forward)
    return (found or macs_by_module(copy.filled(), example_inputs, forward))[""]
