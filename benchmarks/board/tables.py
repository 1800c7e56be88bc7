"""The tables of a board, from its cells."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

from benchmarks.board.cells import (
    ALL_CRITERIA,
    DIVERGENCE,
    KINDS,
    ORDER,
    OURS,
    TUNED,
    UNTUNED,
    Measured,
    Variant,
)
from benchmarks.common.record import Tables
from benchmarks.common.tables import Cell, Column, spread

Field = Literal["accuracy", "agreement"]

WHOLE = "whole model"
BEST = {"untuned": UNTUNED, "tuned": TUNED}

SUMMARY_COLUMNS = (
    Column("level", "kept"),
    Column("kind", "kind"),
    Column("whole", "whole model, %"),
    Column("ours", "divergence, %"),
    Column("rival", "best other"),
    Column("theirs", "its accuracy, %"),
    Column("lead", "lead, points"),
)

AGREEMENT_COLUMNS = (
    Column("level", "kept"),
    Column("kind", "kind"),
    Column("ours", "divergence, %"),
    Column("rival", "best other"),
    Column("theirs", "its agreement, %"),
    Column("lead", "lead, points"),
)

CLASS_COLUMNS = (
    Column("level", "kept"),
    Column("kind", "kind"),
    Column("accuracy", "accuracy, %"),
    Column("balanced", "balanced, %"),
    Column("drop", "most that a class loses, points"),
    Column("balanced_drop", "balanced, points"),
)


def level_names(cells: Sequence[Measured]) -> list[str]:
    """MACs before parameters, and those that keep most first."""

    def place(name: str) -> tuple[str, float]:
        of, kept = name.split()
        return of, -float(kept)

    return sorted({cell.level for cell in cells}, key=place)


def columns(cells: Sequence[Measured]) -> tuple[Column, ...]:
    of_levels = (Column(name, name) for name in level_names(cells))
    return Column("criterion", "Criterion"), Column("kind", "kind"), *of_levels


def over_seeds(
    cells: Sequence[Measured], field: Field = "accuracy"
) -> dict[tuple[Variant, str, str], dict[int, float] | None]:
    """(variant, kind, level) -> seed -> percent; None where a budget was not met."""
    by_place: dict[tuple[Variant, str, str], dict[int, float | None]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        place = (cell.variant, cell.kind, cell.level)
        by_place.setdefault(place, {})[cell.seed] = getattr(cell, field)
    return {
        place: None
        if None in values.values()
        else {seed: 100 * value for seed, value in values.items() if value is not None}
        for place, values in by_place.items()
    }


def whole_accuracies(cells: Sequence[Measured]) -> dict[int, float]:
    """Seed -> that of the whole model in percent."""
    return {cell.seed: 100 * cell.dense for cell in sorted(cells, key=lambda cell: cell.seed)}


def rows_shown(cells: Sequence[Measured]) -> list[tuple[Variant, str]]:
    """Variant and kind of each row, in the order of the board."""

    def place(row: tuple[Variant, str]) -> tuple[int, int, int]:
        variant, kind = row
        allocation = ORDER.index(variant.allocation)
        return ALL_CRITERIA.index(variant.criterion), allocation, KINDS.index(kind)

    rows = {(cell.variant, cell.kind) for cell in cells}
    return sorted(rows, key=place)


def table_rows(cells: Sequence[Measured]) -> list[dict[str, Cell]]:
    """The whole model, then a row for each variant and kind."""
    names, found = level_names(cells), over_seeds(cells)
    whole = spread(list(whole_accuracies(cells).values()))
    rows: list[dict[str, Cell]] = [{"criterion": WHOLE, **dict.fromkeys(names, whole)}]
    for variant, kind in rows_shown(cells):
        row: dict[str, Cell] = {"criterion": str(variant), "kind": kind}
        for name in names:
            values = found.get((variant, kind, name))
            row[name] = None if values is None else spread(list(values.values()))
        rows.append(row)
    return rows


def summary(cells: Sequence[Measured], field: Field = "accuracy") -> list[dict[str, Cell]]:
    """`divergence` against the best of the others, kind by kind, and each by its best kind:
    of those that are not trained on, and of those that are.

    The others are those that owe nothing to `divergence`; the lead is by the same seeds.
    """
    found, whole = over_seeds(cells, field), whole_accuracies(cells)
    kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in cells)]
    rows: list[dict[str, Cell]] = []
    for level in level_names(cells):
        for title, among in [*((kind, (kind,)) for kind in kinds), *BEST.items()]:
            entries = [
                (variant, kind, values)
                for (variant, kind, name), values in found.items()
                if name == level and kind in among and values is not None
            ]
            ours = [entry for entry in entries if entry[0].criterion == DIVERGENCE]
            others = [entry for entry in entries if entry[0].allocation != OURS]
            if not ours or not others:
                continue
            _, _, mine = max(ours, key=lambda entry: statistics.fmean(entry[2].values()))
            rival, kind, theirs = max(others, key=lambda entry: statistics.fmean(entry[2].values()))
            leads = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
            rows.append(
                {
                    "level": level,
                    "kind": title,
                    "whole": spread([whole[seed] for seed in mine]),
                    "ours": spread(list(mine.values())),
                    "rival": f"{rival}, {kind}" if title in BEST else str(rival),
                    "theirs": spread(list(theirs.values())),
                    "lead": spread(leads) if leads else None,
                }
            )
    return rows


def agreements(cells: Sequence[Measured]) -> list[dict[str, Cell]]:
    """The summary of what agrees with the whole model, of the cells of which that is known."""
    known = [cell for cell in cells if cell.agreement is not None or cell.accuracy is None]
    return summary(known, "agreement")


def class_drops(cells: Sequence[Measured]) -> list[dict[str, Cell]]:
    """What balance does for `divergence`: by level and kind, the accuracy and what the class that
    loses most loses, without it and with it."""
    known: dict[tuple[str, str], list[Measured]] = {}
    for cell in cells:
        if cell.criterion == DIVERGENCE and cell.class_drop is not None:
            known.setdefault((cell.level, cell.kind), []).append(cell)
    rows: list[dict[str, Cell]] = []
    for level in level_names([cell for same in known.values() for cell in same]):
        for kind in KINDS:
            plain, balanced = known.get((level, kind)), known.get((level, f"{kind}-balanced"))
            if plain and balanced:
                row: dict[str, Cell] = {"level": level, "kind": kind}
                row["accuracy"], row["drop"] = kept_and_lost(plain)
                row["balanced"], row["balanced_drop"] = kept_and_lost(balanced)
                rows.append(row)
    return rows


def kept_and_lost(cells: Sequence[Measured]) -> tuple[Cell, Cell]:
    """The accuracy, and the loss of the class that loses most, in percent."""
    kept = [100 * cell.accuracy for cell in cells if cell.accuracy is not None]
    lost = [100 * cell.class_drop for cell in cells if cell.class_drop is not None]
    return spread(kept), spread(lost)


def board_tables(cells: Sequence[Measured]) -> Tables:
    """All that a result file shows of a board."""
    more = {
        "summary": summary(cells),
        "classes": class_drops(cells),
        "agreement": agreements(cells),
    }
    return Tables(columns(cells), table_rows(cells), more)
