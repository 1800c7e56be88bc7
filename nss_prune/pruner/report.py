"""What was removed, what it saved, and what was left alone."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from nss_prune.core.replacing import write_text
from nss_prune.errors import ArgumentError, FileFormatError
from nss_prune.graph.costs import Cost
from nss_prune.pruner.figures import Figures, combined
from nss_prune.pruner.page.document import page
from nss_prune.pruner.page.text import change, latency_sentence, slower
from nss_prune.pruner.rows import HEADER, Row, combined_rows
from nss_prune.pruner.spent import STAGE_COLUMNS, spent_lines, stage_rows, step_line

__all__ = ["Report", "Row"]


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a pruning step; print it.

    Attributes:
        rows: Of each layer.
        before, after: Parameters, and multiply-accumulates of a call with the example inputs.
        notes: What a user should know.
        figures: What else is known of the step; reports are equal whatever it took.
        steps: The reports that this one adds up; empty for one step.
        classes: Class -> output that has its score, where the model was pruned for some classes.
    """

    rows: tuple[Row, ...]
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()
    figures: Figures = field(default_factory=Figures, compare=False)
    steps: tuple[Report, ...] = field(default=(), compare=False)
    classes: Mapping[int, int] = field(default_factory=dict)

    @staticmethod
    def total(reports: Sequence[Report]) -> Report:
        """One report of several steps, in their order.

        Raises:
            ArgumentError: There are none.
        """
        if not reports:
            raise ArgumentError("no report was given; take a step first")
        steps = tuple(reports)
        if len(steps) == 1:
            return steps[0]
        everywhere = [note for note in steps[0].notes if all(note in one.notes for one in steps)]
        own = [
            f"step {number}: {note}"
            for number, one in enumerate(steps, 1)
            for note in one.notes
            if note not in everywhere
        ]
        notes = (*everywhere, *own)
        return Report(
            combined_rows(tuple(one.rows for one in steps)),
            steps[0].before,
            steps[-1].after,
            notes,
            combined(tuple(one.figures for one in steps)),
            steps,
            steps[-1].classes,
        )

    def with_figures(self, **figures: Any) -> Report:
        """The same report with more figures, such as ``accuracy=(0.8, 0.78)``.

        Args:
            figures: As of :class:`nss_prune.pruner.figures.Figures`.
        """
        return replace(self, figures=replace(self.figures, **figures))

    @property
    def slower(self) -> bool:
        """Whether a call was timed, and takes no less time than before."""
        return slower(self.figures.latency)

    def __str__(self) -> str:
        lines = _table(HEADER, [row.cells for row in self.rows])
        return "\n".join([*lines, "", *self._summary()])

    def _summary(self) -> list[str]:
        figures = self.figures
        lines = [
            change("parameters", self.before.parameters, self.after.parameters),
            change("MACs", self.before.macs, self.after.macs),
        ]
        if figures.divergence is not None:
            lines.append(f"predicted divergence: {figures.divergence:.4g} nats a sample")
        if figures.latency is not None:
            lines.append(latency_sentence(figures.latency))
        if figures.accuracy is not None:
            whole, smaller = figures.accuracy
            lines.append(f"accuracy: {whole:.2%} -> {smaller:.2%}")
        lines += spent_lines(figures)
        steps = (step_line(number, step) for number, step in enumerate(self.steps, 1))
        return [*lines, *steps, *(f"note: {note}" for note in self.notes)]

    def __repr__(self) -> str:
        pruned = sum(row.after < row.before for row in self.rows)
        left = sum(bool(row.reason) for row in self.rows)
        return (
            f"Report({pruned} of {len(self.rows)} layers pruned, {left} left alone; "
            f"{change('parameters', self.before.parameters, self.after.parameters)}; "
            f"{change('MACs', self.before.macs, self.after.macs)}; {len(self.notes)} notes)"
        )

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        header = "".join(f"<th>{title}</th>" for title in HEADER)
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells) + "</tr>"
            for row in self.rows
        )
        text = "<br>".join(html.escape(line) for line in self._summary())
        return f"<table><tr>{header}</tr>{rows}</table><p>{text}</p>"

    def to_html(self, path: str | os.PathLike[str], title: str = "Pruning report") -> None:
        """Write the report as one HTML file that needs no network, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        write_text(path, page(self, title))

    def to_dataframe(self, of: Literal["layers", "stages"] = "layers") -> Any:
        """The report as a pandas frame.

        Args:
            of: "layers": layer, unit, before, after, reason. "stages": step, stage, seconds,
                memory (bytes by which it raised the peak), and of the step divergence (predicted,
                nats a sample), parameters and macs after it.

        Raises:
            ArgumentError: pandas is not installed, or there is no such frame.
        """
        if of not in ("layers", "stages"):
            raise ArgumentError(f"of is {of!r}; use 'layers' or 'stages'")
        try:
            import pandas
        except ImportError as error:
            raise ArgumentError(
                "to_dataframe needs pandas; run: pip install 'nss_prune[pandas]'"
            ) from error
        if of == "stages":
            return pandas.DataFrame(stage_rows(self.steps or (self,)), columns=STAGE_COLUMNS)
        columns = ["layer", "unit", "before", "after", "reason"]
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=columns)

    def plot(self) -> Any:
        """A matplotlib figure: neurons of each layer, and the divergence over size where known.

        Raises:
            ArgumentError: matplotlib is not installed.
        """
        from nss_prune.pruner.plots import plot_report

        return plot_report(self.rows, self.figures)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "before": asdict(self.before),
            "after": asdict(self.after),
            "notes": list(self.notes),
            "figures": self.figures.to_dict(),
            "steps": [step.to_dict() for step in self.steps],
            "classes": [list(pair) for pair in self.classes.items()],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Report:
        """From what :meth:`to_dict` gave, after JSON too.

        Raises:
            FileFormatError: It is something else.
        """
        try:
            return Report(
                tuple(Row(**row) for row in values["rows"]),
                Cost(**values["before"]),
                Cost(**values["after"]),
                tuple(values["notes"]),
                Figures.from_dict(values["figures"]),
                tuple(Report.from_dict(step) for step in values["steps"]),
                dict(values.get("classes", ())),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FileFormatError(
                f"this is no report ({error!r}); give what Report.to_dict or nss-prune wrote"
            ) from error


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
