"""The sums behind a profile, kept to be merged and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from nss_prune.core.schema import (
    array,
    check_finite,
    check_tensor,
    either,
    names,
    number,
    one_of,
    record,
    row,
    table,
    truth,
    whole,
)
from nss_prune.core.text import elided
from nss_prune.errors import FileFormatError
from nss_prune.profiling.categories import joined
from nss_prune.profiling.contributions.protocol import Contribution, metric_named
from nss_prune.profiling.flat import DrawnSamples
from nss_prune.profiling.similarity import FEATURES, Landscape, LandscapeSums
from nss_prune.profiling.streaming import Part, Sums
from nss_prune.profiling.sums import CategorySums, GroupSums
from nss_prune.statistics.covariance import Covariance

CATEGORY = whole(-(2**62), 2**62)
STATISTICS = record(
    {
        "metrics": names,
        "landscape": record(
            {
                "features": one_of(*FEATURES),
                "centered": truth,
                "positions": either(one_of(None), whole(1)),
            }
        ),
        "sums": array(row(CATEGORY, whole(), table(whole()))),
    },
    {"format": one_of(1, 2), "drawn": table(row(whole(1), number(0, 2)))},
)
"""Of the sums in the notes of a file."""

FORMAT = 2
"""Of the sums in a file. Those of format 1 are raw sums, of which "flat" landscapes were compared
within batches, and variances were those of averages over positions."""


@dataclass(frozen=True)
class Statistics:
    """The sums behind a profile, kept to be merged with those of other data.

    Attributes:
        metrics: The metrics that the sums are for.
        landscape: How the observations were made.
        sums: Category -> sums.
    """

    metrics: tuple[Contribution, ...]
    landscape: Landscape
    sums: Sums

    def __repr__(self) -> str:
        names = ", ".join(elided([metric.name for metric in self.metrics], 6))
        samples = sum(sums.samples for sums in self.sums.values())
        return (
            f"Statistics({len(self.sums)} categories, {samples} samples; metrics {names}; "
            f"{self.landscape})"
        )

    def parts(self) -> Iterator[tuple[Part, Sums]]:
        """Categories that count as one, by the samples of all, with their sums."""
        samples = {category: sums.samples for category, sums in self.sums.items()}
        for part in joined(samples).values():
            yield part, {category: self.sums[category] for category in part}


def total_statistics(statistics: Sequence[Statistics]) -> Statistics:
    """The sums of all shards of the data, made with the same metrics and landscape."""
    total: Sums = {}
    for found in statistics:
        for category, sums in found.sums.items():
            total[category] = total[category] + sums if category in total else sums
    return Statistics(statistics[0].metrics, statistics[0].landscape, total)


def encode_statistics(statistics: Statistics) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and JSON that refers to them."""
    tensors: dict[str, Tensor] = {}
    sums: dict[int, Any] = {}
    drawn: dict[str, Any] = {}
    for category, found in statistics.sums.items():
        rows = {name: group.landscape.covariance.rows for name, group in found.groups.items()}
        sums[category] = [found.samples, rows]
        for name, group in found.groups.items():
            key = f"sums/{category}/{name}"
            tensors[f"{key}/mean"] = group.landscape.covariance.mean[:, 0]
            tensors[f"{key}/scatter"] = group.landscape.covariance.scatter
            for metric, values in group.statistics.items():
                tensors[f"{key}/{metric}"] = values
            kept = group.landscape.drawn
            if kept is not None:
                tensors[f"{key}/drawn keys"] = kept.keys
                tensors[f"{key}/drawn values"] = kept.values
                drawn[key] = [kept.seen, kept.threshold]
    return tensors, {
        "format": FORMAT,
        "metrics": [metric.name for metric in statistics.metrics],
        "landscape": asdict(statistics.landscape),
        "sums": [[category, *rest] for category, rest in sums.items()],
        "drawn": drawn,
    }


def tensors_of_statistics(notes: dict[str, Any]) -> list[str]:
    """Names of the tensors that the notes, which :data:`STATISTICS` allows, refer to."""
    sums = ("mean", "scatter") if notes.get("format", 1) == FORMAT else ("total", "matrix")
    found = [
        f"sums/{category}/{name}/{part}"
        for category, _, rows in notes["sums"]
        for name in rows
        for part in (*sums, *notes["metrics"])
    ]
    drawn = [f"{key}/drawn {part}" for key in notes.get("drawn", {}) for part in ("keys", "values")]
    return [*found, *drawn]


def decode_statistics(
    tensors: dict[str, Tensor], notes: dict[str, Any], layers: Mapping[str, int]
) -> Statistics | None:
    """What :func:`encode_statistics` encoded; None for sums that mean something else today.

    Args:
        layers: Layer -> number of neurons.

    Raises:
        FileFormatError: The sums are of other layers or shapes.
    """
    metrics = tuple(metric_named(name) for name in notes["metrics"])
    landscape = Landscape(**notes["landscape"])
    _check_sums(tensors, notes, layers)
    if notes.get("format", 1) == 1 and not _still_valid(metrics, landscape):
        return None
    sums: Sums = {}
    for category, samples, rows in notes["sums"]:
        groups = {}
        for name, count in rows.items():
            key = f"sums/{category}/{name}"
            values = {metric.name: tensors[f"{key}/{metric.name}"] for metric in metrics}
            kept = _decode_drawn(tensors, key, notes.get("drawn", {}))
            groups[name] = GroupSums(
                LandscapeSums(_decode_covariance(tensors, key, count), kept), values
            )
        sums[category] = CategorySums(samples, groups)
    return Statistics(metrics, landscape, sums)


def _check_sums(
    tensors: Mapping[str, Tensor], notes: dict[str, Any], layers: Mapping[str, int]
) -> None:
    categories = [category for category, *_ in notes["sums"]]
    if len(set(categories)) < len(categories):
        raise FileFormatError("the sums have a category twice")
    for category, _, rows in notes["sums"]:
        if rows.keys() != layers.keys():
            raise FileFormatError(f"the sums of category {category} are of other layers")
        for name in rows:
            _check_group(tensors, f"sums/{category}/{name}", layers[name], notes)


def _check_group(tensors: Mapping[str, Tensor], key: str, size: int, notes: dict[str, Any]) -> None:
    shapes: dict[str, tuple[int | None, ...]] = {
        **dict.fromkeys(("mean", "total"), (size,)),
        **dict.fromkeys(("scatter", "matrix"), (size, size)),
        **dict.fromkeys(notes["metrics"], (None, size)),
    }
    for part, shape in shapes.items():
        if f"{key}/{part}" in tensors:
            check_tensor(f"{key}/{part}", tensors[f"{key}/{part}"], shape)
            check_finite(f"{key}/{part}", tensors[f"{key}/{part}"])
    if key not in notes.get("drawn", {}):
        return
    keys, values = tensors[f"{key}/drawn keys"], tensors[f"{key}/drawn values"]
    check_tensor(f"{key}/drawn keys", keys, (None,))
    check_tensor(f"{key}/drawn values", values, (size, len(keys), None))
    if len(keys) > notes["drawn"][key][0]:
        raise FileFormatError(f"{key!r} keeps more samples than it has seen")


def _still_valid(metrics: tuple[Contribution, ...], landscape: Landscape) -> bool:
    changed = {"var", "ens"}.intersection(metric.name for metric in metrics)
    return landscape.features != "flat" and not changed


def _decode_covariance(tensors: dict[str, Tensor], key: str, rows: int) -> Covariance:
    if f"{key}/scatter" in tensors:
        return Covariance.of(rows, tensors[f"{key}/mean"][:, None], tensors[f"{key}/scatter"])
    total = tensors[f"{key}/total"][:, None]  # of format 1, where the matrix is Σ x xᵀ
    scatter = tensors[f"{key}/matrix"] - total @ total.T / max(1, rows)
    return Covariance.of(rows, total / max(1, rows), scatter)


def _decode_drawn(
    tensors: dict[str, Tensor], key: str, drawn: dict[str, Any]
) -> DrawnSamples | None:
    if key not in drawn:
        return None
    seen, threshold = drawn[key]
    keys, values = tensors[f"{key}/drawn keys"], tensors[f"{key}/drawn values"]
    return DrawnSamples.of(seen, threshold, keys, values)
