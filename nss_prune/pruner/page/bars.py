"""Neurons of each layer before and after, as bars."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from nss_prune.pruner.rows import Row


def bars(rows: Iterable[Row]) -> str:
    """A bar for each layer that could be pruned: what stays, in front of what it had.

    Lengths are square roots of widths, so that narrow layers are seen beside wide ones.
    """
    shown = [row for row in rows if not row.reason]
    widest = max((row.before for row in shown), default=1)
    lines = [_line(row, widest) for row in shown]
    return f'<div class="bars">{"".join(lines)}</div>'


def _line(row: Row, widest: int) -> str:
    share = f"{row.after / row.before:.0%}" if row.before else ""
    before, after = (100 * (width / widest) ** 0.5 for width in (row.before, row.after))
    label = f"{row.title}: {row.before} before, {row.after} after"
    return (
        f'<span class="layer">{escape(row.title)}</span>'
        f'<span class="number">{row.before} &rarr; {row.after} ({share})</span>'
        f'<svg viewBox="0 0 100 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><rect width="{before:.2f}" height="12" '
        f'style="fill:var(--gone)"/><rect width="{after:.2f}" height="12" '
        'style="fill:var(--kept)"/></svg>'
    )
