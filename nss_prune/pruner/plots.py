"""A report as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nss_prune.errors import ArgumentError
from nss_prune.pruner.figures import Figures
from nss_prune.pruner.rows import Row


def plot_report(rows: Sequence[Row], figures: Figures) -> Any:
    """Neurons of each layer before and after; the divergence over size beside them where known.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("plot needs matplotlib; run: pip install 'nss_prune[plot]'") from error
    shown = [row for row in rows if not row.reason]
    known = [point for point in figures.curve if point[1] > 0]
    figure = Figure(figsize=(12 if known else 7, max(3, 0.22 * len(shown) + 1)))
    axes = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    places = range(len(shown))
    axes[0].barh(places, [row.before for row in shown], color="0.85", label="before")
    axes[0].barh(places, [row.after for row in shown], color="tab:blue", label="after")
    axes[0].set_yticks(list(places), [row.title for row in shown], fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("neurons")
    axes[0].legend()
    if known:
        axes[1].semilogy(*zip(*known, strict=True))
        if figures.kept is not None and figures.divergence:
            axes[1].plot(figures.kept, figures.divergence, "o", color="tab:orange", label="chosen")
            axes[1].legend()
        axes[1].set_xlabel(f"share of the {figures.cost} kept")
        axes[1].set_ylabel("predicted divergence, nats a sample")
    figure.tight_layout()
    return figure
