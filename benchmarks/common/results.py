"""Result files: what was measured, what produced it, and the tables that are made from them.

A file holds `columns` and `rows`. The tables of the README are rendered from committed files, never
typed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.provenance import provenance
from benchmarks.common.storage import written_aside
from benchmarks.common.tables import Cell, Column, markdown_table
from nss_prune.errors import FileFormatError

FORMAT = 1
FOLDER = Path(__file__).parents[1] / "results"  # the committed ones
OUTPUT = Path("results")  # of a run: it neither goes on from the committed ones nor replaces them


def write(
    path: Path,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Cell]],
    *,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    **details: Any,
) -> None:
    """Write a result file, whole or not at all; `details` is whatever else explains the rows."""
    content = {
        "format": FORMAT,
        "title": title,
        "made_by": provenance(seeds, device),
        "columns": [asdict(column) for column in columns],
        "rows": list(rows),
        **details,
    }
    with written_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, with its columns as Column objects."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["format"] != FORMAT:
            raise FileFormatError(f"{path} has format {content['format']}, not {FORMAT}.")
        content["columns"] = [Column(**column) for column in content["columns"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"{path} is no result file ({error!r}). Run the script that makes it again."
        ) from error
    return dict(content)


def render(path: Path) -> str:
    """The Markdown of a committed result file, with a line on what produced it."""
    content = read(path)
    made_by = content["made_by"]
    machine, packages = made_by["machine"], made_by["versions"]
    note = (
        f"`{made_by['command']}`, {len(made_by['seeds'])} seed(s), {made_by['date']}, "
        f"{machine['cpu']} ({machine['cores']} cores), {machine['device']}, "
        f"torch {packages['torch']}, nss_prune {packages['nss_prune']}"
    )
    table = markdown_table(content["columns"], content["rows"])
    return f"**{content['title']}**\n\n{table}\n\n{note}\n"
