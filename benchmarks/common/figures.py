"""How the benchmarks draw: to files, on machines without a display too."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot chooses
from matplotlib import pyplot
from matplotlib.figure import Figure

__all__ = ["pyplot", "save_figure"]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file, whose folder is made, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
