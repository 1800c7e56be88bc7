"""Tables: cells that are text, a number, nothing, or mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Cell = str | float | dict[str, Any] | None


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its cells in a row, its heading, and decimals to print."""

    key: str
    title: str
    digits: int = 2


def spread(values: Sequence[float]) -> dict[str, Any]:
    """A cell of one value per seed: their mean, their sample deviation, and themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def show(cell: Cell, digits: int = 2) -> str:
    """A cell as text: "12.34 ± 0.05" for a mean over several seeds, "-" for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, dict):
        mean = f"{cell['mean']:.{digits}f}"
        return f"{mean} ± {cell['std']:.{digits}f}" if len(cell["values"]) > 1 else mean
    return f"{cell:.{digits}f}"


def shown(columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]]) -> list[list[str]]:
    """The table as text, heading first, without the columns that are empty in every row."""
    used = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    body = [[show(row.get(c.key), c.digits) for c in used] for row in rows]
    return [[c.title for c in used], *body]


def text_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]]) -> str:
    """An aligned table for the terminal: the first column to the left, the others to the right."""
    cells = shown(columns, rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]]) -> str:
    """The same table in Markdown."""
    heading, *body = shown(columns, rows)
    rule = ["---"] + ["---:"] * (len(heading) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, rule, *body])
