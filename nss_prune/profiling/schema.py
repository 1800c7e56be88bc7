"""What the file of a profile may hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from nss_prune.core.files import checked_contents, read_file, write_file
from nss_prune.core.schema import (
    array,
    check_finite,
    check_tensor,
    check_tensors,
    names,
    one_of,
    record,
    table,
    text,
    whole,
)
from nss_prune.errors import FileFormatError
from nss_prune.graph.encoding import GROUPS, tensors_of_groups
from nss_prune.profiling.kept import CATEGORY, STATISTICS, tensors_of_statistics
from nss_prune.profiling.similarity import RANKINGS

KIND = "nss_prune profile"
VALUES = ("contributions", "overall", "curves")
ROUNDING = 0.01  # how far a similarity may be outside [0, 1]

NOTES = record(
    {
        "groups": GROUPS,
        "left_alone": table(text),
        "left_alone_sizes": table(whole()),
        "metrics": names,
        "categories": array(array(CATEGORY, least=1), least=1),
        "samples": array(whole(1), least=1),
        "interval": whole(1),
        "notes": array(text),
    },
    {
        "ranked_by": one_of(*RANKINGS),
        "used": whole(),
        "unused": whole(),
        "statistics": STATISTICS,
    },
)


Made = TypeVar("Made")


def write_profile(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], notes: dict[str, Any]
) -> None:
    """Write the file of a profile."""
    write_file(path, KIND, tensors, notes)


def read_profile(
    path: str | os.PathLike[str], decode: Callable[[dict[str, Tensor], dict[str, Any]], Made]
) -> Made:
    """What ``decode`` makes of the tensors and notes of a file, once they are checked.

    Raises:
        FileFormatError: The file is damaged, foreign, or of a newer version.
        OSError: The file cannot be read.
    """
    tensors, notes = read_file(path, KIND, NOTES)
    with checked_contents(path):
        check_profile(tensors, notes)
        return decode(tensors, notes)


def check_profile(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Raise FileFormatError unless the tensors are those that the notes speak of.

    Args:
        notes: What :data:`NOTES` allows.
    """
    metrics, sizes = notes["metrics"], {name: size for name, size, *_ in notes["groups"]}
    categories = [label for part in notes["categories"] for label in part]
    alike = len(notes["categories"]) == len(notes["samples"])
    if not metrics or not alike or len(set(categories)) < len(categories):
        raise FileFormatError(
            f"the metrics are {metrics[:4]}, the categories {notes['categories'][:4]} of "
            f"{notes['samples'][:4]} samples"
        )
    if notes["left_alone_sizes"].keys() != notes["left_alone"].keys():
        raise FileFormatError("the layers left alone and their sizes differ")
    values = {
        f"{kind}/{metric}/{name}": (kind, size)
        for kind in VALUES
        for metric in metrics
        for name, size in sizes.items()
    }
    sums = notes.get("statistics")
    more = [] if sums is None else tensors_of_statistics(sums)
    if sums is not None and "format" not in sums:  # an early version, of which less is used
        more += [name for name in tensors if name.startswith("sums/")]
    check_tensors(tensors, [*values, *tensors_of_groups(notes["groups"]), *more])
    for name, (kind, size) in values.items():
        rows = () if kind == "overall" else (len(notes["samples"]),)
        check_tensor(name, tensors[name], (*rows, size))
        _check_values(name, kind, tensors[name])
    if sums is not None:
        _check_samples(notes, {category: samples for category, samples, _ in sums["sums"]})


def _check_samples(notes: Mapping[str, Any], samples: Mapping[int, int]) -> None:
    """The categories are those of the sums, of as many samples."""
    parts = [[samples.get(label, 0) for label in part] for part in notes["categories"]]
    counted = [sum(part) for part in parts]
    if counted != notes["samples"] or sum(map(len, parts)) != len(samples):
        raise FileFormatError(f"the sums are of {counted} samples, not {notes['samples']}")


def _check_values(name: str, kind: str, values: Tensor) -> None:
    check_finite(name, values)
    outside = (values < -ROUNDING) | (values > 1 + ROUNDING)
    if kind == "curves" and bool(outside.any()):
        raise FileFormatError(f"tensor {name!r} has similarities outside [0, 1]")
