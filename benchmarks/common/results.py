"""Result files: what was measured, what produced it, and the tables that are made from them.

A file holds `columns` and `rows`; a cell is text, a number, nothing, or mean and spread over
seeds. The tables of the README are rendered from committed files, never typed:

    python benchmarks/results.py benchmarks/results/rq2-mlp-digits.json
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.common.storage import written_aside
from nss_prune.errors import ArgumentError, FileFormatError

FORMAT = 1
FOLDER = Path(__file__).parents[1] / "results"  # the committed ones
OUTPUT = Path("results")  # of a run: it neither goes on from the committed ones nor replaces them
PACKAGES = ("nss_prune", "torch", "torchvision", "torch-pruning", "captum", "timm")

Cell = str | float | dict[str, Any] | None
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its cells in a row, its heading, and decimals to print."""

    key: str
    title: str
    digits: int = 2


def spread(values: Sequence[float]) -> dict[str, Any]:
    """A cell of one value per seed: their mean, their sample deviation, and themselves."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


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


def earlier(path: Path, options: Mapping[str, Any], key: str, kind: type[Entry]) -> list[Entry]:
    """What a run with the same options has written under a key, to go on from.

    Raises:
        ArgumentError: It was measured in another way.
    """
    if not path.exists():
        return []
    content = read(path)
    wanted = json.loads(json.dumps(options))
    if content.get("options") != wanted:
        raise ArgumentError(
            f"{path} was measured with {content.get('options')}, and this run is with {wanted}; "
            "measure in the same way, start anew (--fresh, or without --resume) or give another "
            "--output."
        )
    return [kind(**fields) for fields in content[key]]


def provenance(seeds: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """Command, seeds, versions, machine and date: what a number needs to be made again."""
    return {
        "command": command(sys.argv),
        "seeds": list(seeds),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": {
            "cpu": processor(),
            "cores": available_cores(),
            "device": device_name(torch.device(device)),
            "system": platform.system(),
        },
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def command(argv: Sequence[str]) -> str:
    """The command line, with folders of this machine written as DIR: a file is to be shared."""
    script = f"benchmarks/{Path(argv[0]).name}"
    return shlex.join(["python", script, *map(shareable, argv[1:])])


def shareable(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}DIR" if Path(value).is_absolute() else word


def versions() -> dict[str, str | None]:
    return {package: version(package) for package in PACKAGES}


def version(package: str) -> str | None:
    """The version that a package states itself, else that of its installation; None without it."""
    stated = getattr(sys.modules.get(package.replace("-", "_")), "__version__", None)
    try:
        return str(stated or metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def available_cores() -> int:
    """The cores that this process may use, which can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def show(cell: Cell, digits: int = 2) -> str:
    """A cell as text: "12.34 ± 0.05" for a mean over several seeds, "-" for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, dict):
        mean = f"{cell['mean']:.{digits}f}"
        return f"{mean} ± {cell['std']:.{digits}f}" if len(cell["values"]) > 1 else mean
    return f"{cell:.{digits}f}"


def shown(columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]]) -> list[list[str]]:
    """The table as text, heading first, without the columns that are empty in every row."""
    used = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    body = [[show(row.get(c.key), c.digits) for c in used] for row in rows]
    return [[c.title for c in used], *body]


def text_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]]) -> str:
    """An aligned table for the terminal: the first column to the left, the others to the right."""
    cells = shown(columns, rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Cell]]) -> str:
    """The same table in Markdown."""
    heading, *body = shown(columns, rows)
    rule = ["---"] + ["---:"] * (len(heading) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, rule, *body])


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


if __name__ == "__main__":
    print("\n".join(render(Path(name)) for name in sys.argv[1:]))
