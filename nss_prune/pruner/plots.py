"""A report as a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nss_prune.errors import ArgumentError
from nss_prune.pruner.figures import Figures
from nss_prune.pruner.rows import Row


def plot_report(rows: Sequence[Row], figures: Figures) -> Any:
    """Neurons of each layer before and after; the divergence over size beside them where known.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    shown = [row for row in rows if not row.reason]
    known = [point for point in figures.curve if point[1] > 0]
    figure = _figure(12 if known else 7, max(3, 0.22 * len(shown) + 1))
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


def plot_sensitivity(table: Mapping[str, Mapping[float, float]]) -> Any:
    """A heat map: layer -> share of its neurons gone -> nats, the colours on a logarithmic scale.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    figure = _figure(8, max(3, 0.22 * len(table) + 1.5))
    shares = sorted({share for by_share in table.values() for share in by_share})
    least = min((v for row in table.values() for v in row.values() if v > 0), default=1.0)
    values = [
        [math.log10(max(row.get(share, math.nan), least)) for share in shares]
        for row in table.values()
    ]
    axes = figure.subplots()
    drawn = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
    axes.set_yticks(range(len(table)), list(table), fontsize=7)
    axes.set_xlabel("share of the layer's neurons gone")
    figure.colorbar(drawn, label="predicted divergence, log10 of nats a sample")
    figure.tight_layout()
    return figure


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError(
            "a plot needs matplotlib; run: pip install 'nss_prune[plot]'"
        ) from error
    return Figure(figsize=(width, height))
