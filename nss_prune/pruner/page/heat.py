"""A table of numbers, each on a ground as strong as the number is large."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

MOST_COLUMNS = 24


def sensitivity_map(table: Mapping[str, Mapping[float, float]]) -> str:
    """Layer x share of its neurons that goes; the ground is by the logarithm of the nats."""
    shares = sorted({share for by_share in table.values() for share in by_share})
    nats = [value for by_share in table.values() for value in by_share.values() if value > 0]
    low, high = (math.log10(min(nats)), math.log10(max(nats))) if nats else (0.0, 1.0)
    # Below a ten-thousandth of the largest, differences are of no account.
    low = max(low, high - 4)

    def strength(value: float) -> float:
        if value <= 0 or high == low:
            return 0.0
        return min(1.0, max(0.0, (math.log10(value) - low) / (high - low)))

    rows = {
        layer: [(_nats(by_share[x]), strength(by_share[x])) if x in by_share else None
                for x in shares]
        for layer, by_share in table.items()
    }  # fmt: skip
    return _table([f"{share:.0%}" for share in shares], rows)


def category_map(table: Mapping[str, Mapping[str, float]]) -> str:
    """Layer x category, shares in [0, 1]; the categories that keep least, where there are many."""
    names = list(dict.fromkeys(name for by_name in table.values() for name in by_name))
    kept = {name: min(row.get(name, 1.0) for row in table.values()) for name in names}
    shown = sorted(names, key=kept.__getitem__)[:MOST_COLUMNS]
    shown = [name for name in names if name in set(shown)]
    rows = {
        layer: [(f"{row[x]:.0%}", row[x] ** 2) if x in row else None for x in shown]
        for layer, row in table.items()
    }
    left_out = len(names) - len(shown)
    more = f'<p class="quiet">{left_out} more categories keep more.</p>' if left_out else ""
    return _table(shown, rows) + more


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[tuple[str, float] | None]]) -> str:
    header = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = (
        f'<tr><th class="layer">{escape(layer)}</th>{"".join(map(_cell, cells))}</tr>'
        for layer, cells in rows.items()
    )
    return (
        f'<div class="scroll"><table class="heat"><tr><th></th>{header}</tr>{"".join(lines)}'
        "</table></div>"
    )


def _cell(cell: tuple[str, float] | None) -> str:
    if cell is None:
        return "<td></td>"
    text, strength = cell
    return f'<td style="background:rgba(var(--heat),{0.05 + 0.6 * strength:.2f})">{text}</td>'


def _nats(value: float) -> str:
    if value >= 0.01 or value == 0:
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"{value:.0e}".replace("e-0", "e-")
