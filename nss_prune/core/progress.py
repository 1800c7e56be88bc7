"""One progress bar over all passes of a run, and a line in the log ``nss_prune`` for each."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

from nss_prune.core.processes import is_first

TITLES = {
    "outputs": "measuring outputs",
    "sensitivity": "measuring sensitivities",
    "effects": "measuring effects",
    "profile": "profiling",
    "folding": "observing consumers",
    "verification": "verifying the folding",
    "refit": "refitting consumers",
    "recalibration": "observing norms",
    "balance": "observing classes",
}

log = logging.getLogger("nss_prune")


class Progress:
    """The passes of a run, of which each is a share of the whole.

    Args:
        planned: Name and share of each pass, in any unit. One that does not come is passed over at
            the end, and one that is not planned is as long as the shortest.
        progress: Show a progress bar; None for only on a terminal.
    """

    def __init__(self, planned: Sequence[tuple[str, float]], progress: bool | None = None) -> None:
        self._planned = list(planned)
        self._done = self._begun = 0.0
        self._number = 0
        self._passes = len(planned)
        whole = sum(share for _, share in planned)
        hidden = None if progress is None else not progress
        shape = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
        disabled = hidden if is_first() else True
        self._bar = tqdm(total=whole, leave=False, disable=disabled, bar_format=shape)
        self._start = time.monotonic()

    @contextlib.contextmanager
    def running(self) -> Iterator[Progress]:
        """Within the context all passes are shown here; if it is left well, the end is reached."""
        token = _RUNNING.set(self)
        try:
            yield self
            self._move(self._whole)
        finally:
            _RUNNING.reset(token)
            self._bar.close()

    @property
    def share(self) -> float:
        """Of the whole that is done, in [0, 1]."""
        return self._done / self._whole if self._whole else 1.0

    @property
    def seconds_left(self) -> float | None:
        """By the pace so far; None at the start."""
        if not self._done:
            return None
        spent = time.monotonic() - self._start
        return spent * (self._whole - self._done) / self._done

    def over(self, items: Iterable[Any], name: str) -> Iterator[Any]:
        """The items of one pass."""
        end = self._enter(name)
        try:
            count = len(items)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            count = 0
        step = (end - self._done) / count if count else 0.0
        try:
            for item in items:
                yield item
                self._move(min(end, self._done + step))
        finally:
            self._move(end)

    @property
    def _whole(self) -> float:
        return float(self._bar.total or 0.0)

    def _enter(self, name: str) -> float:
        """Begin a pass; where it ends."""
        names = [planned for planned, _ in self._planned]
        if name in names:
            _, share = self._planned.pop(names.index(name))
        else:
            share = min((share for _, share in self._planned), default=1.0)
            self._passes += 1
            self._bar.total = self._whole + share
        self._number += 1
        left = self.seconds_left
        rest = "" if left is None else f", {left:.0f} s left"
        title = TITLES.get(name, name)
        self._bar.set_description(title)
        if is_first():
            log.info("%d/%d %s%s", self._number, self._passes, title, rest)
        return self._done + share

    def _move(self, done: float) -> None:
        self._bar.update(done - self._done)
        self._done = done


_RUNNING: ContextVar[Progress | None] = ContextVar("nss_prune_progress", default=None)


def shown(
    items: Iterable[Any], progress: bool | None, name: str, unit: str = "batch"
) -> Iterable[Any]:
    """The items of a pass, as a part of the run that is shown, or with a bar of their own.

    Args:
        progress: Show a progress bar; None for only on a terminal.
        name: Of the pass; "" for one that is not shown.
    """
    running = _RUNNING.get()
    if running is not None:
        return running.over(items, name) if name else items
    hidden = None if progress is None else not progress
    bar: Iterable[Any] = tqdm(items, desc=name, unit=unit, leave=False, disable=hidden)
    return bar
