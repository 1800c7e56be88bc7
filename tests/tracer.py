"""Raise an exception at the n-th point of this library that a call of it comes to.

A point is a call of a function of the library, or a line of one. Three kinds of lines are none:

- ``try:`` and the like, whose instruction does nothing, so that nothing can be raised there;
- the first line of a ``finally`` for the same reason: what it calls has points of its own;
- the way out of a ``with`` body that ended well. No instruction there can fail either, and an
  interrupt that Python delivers in the few between the body and ``__exit__`` skips the latter
  whatever is written (https://github.com/python/cpython/issues/74174).
"""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import nss_prune

PACKAGE = str(Path(nss_prune.__file__).parent)
DEADLINE = str(
    Path(PACKAGE, "graph", "deadline.py")
)  # whose thread expects its own exception alone


class Points:
    """Counts the points that are come to, and raises an exception at one of them.

    Args:
        number: Of the point, from 0; None to count alone.
        error: What is raised there.
        everywhere: Count those of other threads than this one too.

    Attributes:
        seen: Where the points were, in order.
        own: Those of this thread.
        place: Where it was raised; None if it was not.
        dropped: Where Python dropped what was raised, as it does in a finaliser; None if it did
            not.
    """

    def __init__(
        self,
        number: int | None = None,
        error: BaseException | None = None,
        everywhere: bool = True,
    ) -> None:
        self.number, self.error, self.everywhere = number, error, everywhere
        self.seen: list[str] = []
        self.own: list[str] = []
        self._thread = threading.get_ident()
        self.place: str | None = None
        self.dropped: str | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the context, points are counted, and the exception is raised."""
        told = sys.unraisablehook
        sys.unraisablehook = self._drop
        if self.everywhere:
            threading.settrace(self._called)
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            sys.unraisablehook = told

    def _drop(self, lost: Any) -> None:
        if lost.exc_value is self.error:
            self.dropped = repr(lost.object)

    def _called(self, frame: FrameType, event: str, value: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or self.place is not None:
            return None
        if frame.f_code.co_filename == DEADLINE and threading.get_ident() != self._thread:
            return None
        self._come_to(frame, event)
        return self._traced

    def _traced(self, frame: FrameType, event: str, value: Any) -> Any:
        if event == "line" and frame.f_lasti not in _without_effect(frame.f_code):
            self._come_to(frame, event)
        return self._traced

    def _come_to(self, frame: FrameType, event: str) -> None:
        if self.place is not None:
            return
        place = _place(frame.f_code, frame.f_lineno, event)
        self.seen.append(place)
        if threading.get_ident() == self._thread:
            self.own.append(place)
        if len(self.seen) - 1 == self.number and self.error is not None:
            self.place = place
            raise self.error


@functools.cache
def _place(code: CodeType, line: int, event: str) -> str:
    return f"{event} of {code.co_name} in {code.co_filename.removeprefix(PACKAGE + '/')}:{line}"


@functools.cache
def _without_effect(code: CodeType) -> frozenset[int]:
    """Offsets of instructions at which no line counts as a point."""
    steps = list(dis.get_instructions(code))
    last = _first_lines_of_finally(code.co_filename)
    found = {s.offset for s in steps if s.opname == "NOP" or s.starts_line in last}
    for before, *three in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        if all(step.opname == "LOAD_CONST" and step.argval is None for step in three):
            found |= {three[0].offset, *([before.offset] if before.opname == "SWAP" else [])}
    return frozenset(found)


@functools.cache
def _first_lines_of_finally(file: str) -> frozenset[int]:
    tree = ast.parse(Path(file).read_text("utf-8"))
    tries = (node for node in ast.walk(tree) if isinstance(node, ast.Try) and node.finalbody)
    return frozenset(node.finalbody[0].lineno for node in tries)
