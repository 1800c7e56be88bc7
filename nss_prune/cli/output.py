"""The file that a command writes a model to."""

from __future__ import annotations

import os
from pathlib import Path

from nss_prune.errors import ArgumentError


def output_path(path: str | None, *others: str | None) -> Path:
    """The file to write, in a folder that is there: better known before the work than after.

    Args:
        others: Further files that will be written; None for none.

    Raises:
        ArgumentError: There is no such folder, or the file is of another kind.
    """
    if not path:
        raise ArgumentError("no output is given; pass -o small.safetensors")
    if Path(path).suffix in (".yaml", ".json", ".html"):
        raise ArgumentError(f"{path!r} is written beside the model; end it with .safetensors")
    for place in (path, *others):
        folder = Path(place or path).parent
        if not os.access(folder, os.W_OK) or not folder.is_dir():
            raise ArgumentError(f"there is no folder {os.fspath(folder)!r} to write to; make it")
    return Path(path)
