"""What was removed, what it saved, and what was left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nss_prune.graph.costs import Cost
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.pruner.planning import Plan


@dataclass(frozen=True)
class Row:
    """One layer: channels before and after, and why it was left alone ("" where it was not).

    ``unit`` says what is counted.
    """

    layer: str
    before: int
    after: int
    reason: str = ""
    unit: str = "channels"

    @property
    def title(self) -> str:
        """The layer, with the unit where it is not channels."""
        return self.layer if self.unit == "channels" else f"{self.layer} ({self.unit})"


@dataclass(frozen=True)
class Report:
    """The result of a pruning step; print it."""

    rows: tuple[Row, ...]
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = _table(
            ("layer", "before", "after", "left alone because"),
            [(row.title, str(row.before), str(row.after), row.reason) for row in self.rows],
        )
        lines.append("")
        lines.append(_change("parameters", self.before.parameters, self.after.parameters))
        lines.append(_change("MACs", self.before.macs, self.after.macs))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def report_of(plan: Plan, before: Cost, notes: Sequence[str] = ()) -> Report:
    """The report of a step that was taken.

    Args:
        before: The model's cost before it.
        notes: Of the repairs.
    """
    subject, evidence = plan.subject, plan.evidence
    rows = report_rows(subject.model, plan.slice, subject.neurons)
    found = (*subject.neurons.notes, *plan.notes, *evidence.notes, *notes)
    return Report(rows, before, subject.cost(), found)


def report_rows(model: nn.Module, critical: Slice, neurons: NeuronMap) -> tuple[Row, ...]:
    """A row for each layer that has neurons, in the order of the model's modules."""
    rows = {
        group.name: Row(
            group.name,
            group.size * group.ties,
            int(critical.kept[group.name].sum()) * group.ties,
            unit="channels" if group.has_channels else "heads",
        )
        for group in neurons.groups
    }
    for name, reason in neurons.left_alone.items():
        size = neurons.left_alone_sizes[name]
        rows[name] = Row(name, size, size, reason)
    return tuple(rows[name] for name, _ in model.named_modules() if name in rows)


def _change(what: str, before: int, after: int) -> str:
    share = f" ({1 - after / before:.1%} gone)" if before else ""
    return f"{what}: {before:,} -> {after:,}{share}"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for cells in [header, *rows]:
        numbers = [
            cell.rjust(width) if i in (1, 2) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join(numbers).rstrip())
    return lines
