"""The plot of a board."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.board.cells import ALL_CRITERIA, DIVERGENCE, KINDS, ORDER, Measured
from benchmarks.board.tables import level_names, over_seeds, rows_shown
from benchmarks.common.figures import pyplot, save_figure


def plot(title: str, cells: Sequence[Measured], path: Path) -> None:
    """A panel for each kind and measure: a colour for a criterion, a style for an allocation."""
    found, names = over_seeds(cells), level_names(cells)
    measures = list(dict.fromkeys(name.split()[0] for name in names))
    kinds = [kind for kind in KINDS if any(cell.kind == kind for cell in cells)]
    variants = list(dict.fromkeys(variant for variant, _ in rows_shown(cells)))
    height = max(3.6 * len(measures), 1.0 + 0.17 * len(variants))
    figure, panels = pyplot.subplots(
        len(measures), len(kinds), figsize=(3.8 * len(kinds) + 2, height),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    styles = dict(zip(ORDER, (":", "-", "-.", "--"), strict=True))
    for panel_row, measure_name in zip(panels, measures, strict=True):
        here = [name for name in names if name.startswith(f"{measure_name} ")]
        for panel, kind in zip(panel_row, kinds, strict=True):
            for variant in variants:
                points = [
                    (100 * float(name.split()[1]), statistics.fmean(values.values()))
                    for name in here
                    if (values := found.get((variant, kind, name)))
                ]
                colour = f"C{ALL_CRITERIA.index(variant.criterion)}"
                is_ours = variant.criterion == DIVERGENCE
                style = "-" if is_ours else styles[variant.allocation]
                x, y = zip(*points, strict=True) if points else ((), ())
                panel.plot(x, y, style, color="black" if is_ours else colour, marker=".",
                           linewidth=2.5 if is_ours else 1.0, label=str(variant))  # fmt: skip
            panel.set(title=kind, xlabel=f"{measure_name} kept, %")
            panel.invert_xaxis()
            panel.grid(alpha=0.3)
        panel_row[0].set(ylabel="accuracy, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=7)
    figure.suptitle(title)
    save_figure(figure, path)
