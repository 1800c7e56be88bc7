"""Write a file aside and move it into place, so that an interrupted write leaves the old one."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, with the same ending; what is there takes the place of ``path``.

    If the body raises, an interrupt included, ``path`` is as it was and nothing is left beside it.
    """
    target = Path(path)
    aside = target.with_name(f".{uuid.uuid4().hex}.{target.name}")
    try:
        yield aside
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
