"""Where the metrics of a training are written: a table, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from nss_prune.core.processes import is_first
from nss_prune.training.settings import Metrics, OnEpoch


class CSVLog:
    """The history as a CSV file, written anew after each epoch: a resumed training goes on.

    Args:
        path: Of the file; its folder is made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __call__(self, metrics: Metrics) -> None:
        """Add an epoch; a row of the same or a later one is replaced."""
        if not is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in self._rows() if float(row["epoch"]) < metrics["epoch"]]
        rows.append({name: str(value) for name, value in metrics.items()})
        names = list(dict.fromkeys(name for row in rows for name in row))
        aside = self.path.with_name(f".{self.path.name}.aside")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(aside, self.path)

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))


class TensorBoardLog:
    """The history as scalars for TensorBoard.

    Args:
        folder: Of the event files.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoardLog needs TensorBoard: pip install 'nss_prune[finetune]'"
            ) from error
        self._writer = SummaryWriter(os.fspath(folder)) if is_first() else None

    def __call__(self, metrics: Metrics) -> None:
        """Add an epoch."""
        if self._writer is None:
            return
        for name, value in metrics.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, int(metrics["epoch"]))
        self._writer.flush()


def logs_in(folder: str | os.PathLike[str]) -> list[OnEpoch]:
    """A CSV file, and TensorBoard's events where that is installed."""
    found: list[OnEpoch] = [CSVLog(Path(folder) / "history.csv")]
    try:
        found.append(TensorBoardLog(folder))
    except ImportError:
        return found
    return found


def call_all(functions: Sequence[OnEpoch]) -> OnEpoch:
    """One function that calls several."""

    def on_epoch(metrics: Metrics) -> None:
        for function in functions:
            function(metrics)

    return on_epoch
