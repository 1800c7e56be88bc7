"""What a command says while it works, on stderr, and what it gives in the end, on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
        text: For a person.
        values: For ``--json``.
        next: What to do next, in one line.
    """

    text: str
    values: dict[str, Any] = field(default_factory=dict)
    next: str = ""


class Console:
    """Lines on stderr with the stage, its number and the seconds since the start.

    Args:
        stages: How many there will be.
        quiet: Say nothing.
    """

    def __init__(self, stages: int, quiet: bool = False) -> None:
        self.stages = stages
        self.quiet = quiet
        self._done = 0
        self._begun = time.perf_counter()

    @property
    def progress(self) -> bool | None:
        """``progress=`` of what shows a bar."""
        return False if self.quiet else None

    def stage(self, name: str) -> None:
        """Say that a stage begins."""
        self._done += 1
        self.say(f"{self._done}/{self.stages} {name}")

    def say(self, text: str) -> None:
        """Write a line."""
        if not self.quiet:
            print(f"[{time.perf_counter() - self._begun:5.0f} s] {text}", file=sys.stderr)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within, what the package logs and warns of is said as well."""
        logger = logging.getLogger("nss_prune")
        handler, level = _Handler(self), logger.level
        with warnings.catch_warnings():
            warnings.showwarning = self._warned
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            try:
                yield
            finally:
                logger.removeHandler(handler)
                logger.setLevel(level)

    def _warned(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.say(f"warning: {message}")


class _Handler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(f"    {record.getMessage()}")


def give(outcome: Outcome, as_json: bool) -> None:
    """Write what was found to stdout, and what to do next."""
    if as_json:
        print(json.dumps({**outcome.values, "next": outcome.next}, indent=2))
        return
    print(outcome.text)
    if outcome.next:
        print(f"next: {outcome.next}")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in [header, *rows]
    )
