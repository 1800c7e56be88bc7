"""How the scripts save their figures."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot
from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file, whose folder is made, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
