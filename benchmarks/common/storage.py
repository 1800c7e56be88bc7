"""Files that are whole or absent: written aside, then put in place; damaged caches are remade."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nss_prune.core.replacing import replacing

DEFAULT_CACHE = Path.home() / ".cache" / "nss_prune"

# What torch.load raises on files that are empty, cut short, or no archives of tensors at all.
DAMAGED = (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError,
           zipfile.BadZipFile)  # fmt: skip


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes `path`'s place once the body is through."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        yield aside


def save_tensors(content: dict[str, Any], path: Path) -> None:
    """Write `content` (tensors, numbers, strings and dicts of them) to `path`, whole or not."""
    with written_aside(path) as aside:
        torch.save(content, aside)


def load_tensors(path: Path) -> dict[str, Any] | None:
    """What `save_tensors` wrote to `path`; None where there is nothing or it cannot be read."""
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        warnings.warn(f"{path} is damaged and is made again: {error}", stacklevel=2)
        return None
    return content if isinstance(content, dict) else None
