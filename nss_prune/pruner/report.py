"""What was removed, what it saved, and what was left alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd

from nss_prune.core.models import submodule
from nss_prune.graph.costs import Cost
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.pruner.classes import KEPT_CLASSES
from nss_prune.pruner.planning import Plan
from nss_prune.pruner.subject import Subject
from nss_prune.structures.attention import HEADS

NOT_FOLLOWED = "not followed: it runs without gradients, in another part, or not in this call"

HEADER = ("layer", "before", "after", "left alone because")


@dataclass(frozen=True)
class Row:
    """One layer: channels before and after, and why it was left alone ("" where it was not).

    Attributes:
        unit: What is counted: "channels", "heads" of attention, or "units" of several channels.
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

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table shows, under :data:`HEADER`."""
        return self.title, str(self.before), str(self.after), self.reason


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a pruning step; print it.

    Attributes:
        classes: Class -> output that has its score, where the model was pruned for some classes.
    """

    rows: tuple[Row, ...]
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()
    classes: Mapping[int, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = _table(HEADER, [row.cells for row in self.rows])
        lines.append("")
        lines.append(_change("parameters", self.before.parameters, self.after.parameters))
        lines.append(_change("MACs", self.before.macs, self.after.macs))
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)

    def __repr__(self) -> str:
        pruned = sum(row.after < row.before for row in self.rows)
        left = sum(bool(row.reason) for row in self.rows)
        return (
            f"Report({pruned} of {len(self.rows)} layers pruned, {left} left alone; "
            f"{_change('parameters', self.before.parameters, self.after.parameters)}; "
            f"{_change('MACs', self.before.macs, self.after.macs)}; {len(self.notes)} notes)"
        )

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        header = "".join(f"<th>{title}</th>" for title in HEADER)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells) + "</tr>"
            for row in self.rows
        )
        lines = [
            _change("parameters", self.before.parameters, self.after.parameters),
            _change("MACs", self.before.macs, self.after.macs),
            *(f"note: {note}" for note in self.notes),
        ]
        text = "<br>".join(html.escape(line) for line in lines)
        return f"<table><tr>{header}</tr>{rows}</table><p>{text}</p>"


def report_of(plan: Plan, before: Cost, notes: Sequence[str] = ()) -> Report:
    """The report of a step that was taken.

    Args:
        before: The model's cost before it.
        notes: Of the repairs.
    """
    subject, evidence = plan.subject, plan.evidence
    rows = report_rows(subject, plan.slice)
    found = (*subject.neurons.notes, *plan.notes, *evidence.notes, *notes)
    return Report(rows, before, subject.cost(), found, plan.classes)


def report_rows(subject: Subject, chosen: Slice) -> tuple[Row, ...]:
    """A row for each layer that has neurons, in the order of the model's modules."""
    rows = {
        group.name: Row(
            group.name,
            group.size * group.ties,
            int(chosen.kept[group.name].sum()) * group.ties,
            unit=_unit(subject.model, group),
        )
        for group in subject.groups
    }
    for name, reason in subject.neurons.left_alone.items():
        size = subject.neurons.left_alone_sizes[name]
        rows[name] = Row(name, size, _width(subject.model, name, size), reason)
    for name, size in _unknown(subject).items():
        rows.setdefault(name, Row(name, size, size, NOT_FOLLOWED))
    return tuple(rows[name] for name, _ in subject.model.named_modules() if name in rows)


def _width(model: nn.Module, name: str, before: int) -> int:
    """The channels of a layer that was left alone; a head may have lost some of its classes."""
    layer = submodule(model, name)
    return len(getattr(layer, KEPT_CLASSES, ())) or before


def _unit(model: nn.Module, group: NeuronGroup) -> str:
    """What the neurons of a group are called."""
    if group.has_channels:
        return "channels"
    around = submodule(model, group.name.rpartition(".")[0])
    return "heads" if any(hasattr(around, name) for name in HEADS) else "units"


def _unknown(subject: Subject) -> dict[str, int]:
    """Layers that tracing did not come to, and their channels."""
    known = {member.name for group in subject.groups for member in group.members}
    traced = set() if subject.graph is None else set(subject.graph.module2node)
    return {
        name: layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        for name, layer in subject.model.named_modules()
        if isinstance(layer, (nn.Linear, _ConvNd)) and name not in known and layer not in traced
    }


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
