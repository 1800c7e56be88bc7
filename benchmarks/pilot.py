"""The paper's pilot study (section 3.1, Tables 1 to 3): mask a band of the ranking, measure.

    python benchmarks/pilot.py                                         seconds, no download
    python benchmarks/pilot.py --settings vgg16-cifar10 --data DIR

The neurons of every layer are ranked by a metric, and those between 0 and 10 %, 10 and 20 %, ...
are masked. Ranked over all data, the accuracy on all test data follows (Table 1); ranked for each
category, that on the test data of the category, averaged (Table 2) or for single categories
(Table 3). A metric that ranks well loses most with the first band, and less with each further one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks.common import results, tables
from benchmarks.common.data import Data, Split, load
from benchmarks.common.options import add_metrics, checked_seeds, common, run, usable_device
from benchmarks.common.settings import Setting, chosen, profiled_batches
from benchmarks.common.tables import Cell, Column, spread
from benchmarks.common.training import accuracy, trained
from benchmarks.published import slicing as targets
from nss_prune import Profile, Slice, profile
from nss_prune.profiling.similarity import ranked

BANDS = ((0.0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5))
SINGLE = (0, 3, 6, 9)  # the categories of Table 3, counted from 0
Runs = dict[tuple[str, str], list[float]]  # (row, column) -> a value for each seed


def without_band(scores: dict[str, Tensor], band: tuple[float, float], known: Profile) -> Slice:
    """All neurons but those of a band of the ranking, of at least one neuron, in every layer."""
    kept = {}
    for name, values in scores.items():
        first, last = (round(share * len(values)) for share in band)
        mask = torch.ones(len(values), dtype=torch.bool)
        mask[ranked(values)[first : max(last, first + 1)]] = False
        kept[name] = mask
    return Slice(kept, known.groups)


def masked_accuracy(model: nn.Module, critical: Slice, split: Split) -> float:
    with critical.masked(model):
        return 100 * accuracy(model, split)


def measure(model: nn.Module, known: Profile, test: Split, metric: str) -> dict[str, list[float]]:
    """ "global" and each category -> accuracy after masking each band, percent."""
    found = {
        "global": [
            masked_accuracy(model, without_band(known.overall[metric], band, known), test)
            for band in BANDS
        ]
    }
    for number, part in enumerate(known.categories):
        mine = test.subset(torch.isin(test.labels.cpu(), torch.tensor(part)).nonzero().flatten())
        scores = {name: values[number] for name, values in known.contributions[metric].items()}
        found[str(part[0])] = [
            masked_accuracy(model, without_band(scores, band, known), mine) for band in BANDS
        ]
    return found


def run_setting(
    setting: Setting, data: Data, seeds: Sequence[int], metrics: Sequence[str], cache: Path
) -> dict[str, list[dict[str, list[float]]]]:
    """metric -> what :func:`measure` finds, for each seed."""
    found: dict[str, list[dict[str, list[float]]]] = {metric: [] for metric in metrics}
    for seed in seeds:
        device = data.train.labels.device
        model = trained(
            setting.name, setting.build, data, setting.recipe, seed, cache, device
        ).model
        known = profile(model, profiled_batches(setting, data), metrics=tuple(metrics))
        for metric in metrics:
            found[metric].append(measure(model, known, data.test, metric))
        print(f"{setting.name}, seed {seed}: done", flush=True)
    return found


def band_name(band: tuple[float, float]) -> str:
    return f"{band[0]:.0%} to {band[1]:.0%}"


def tables_of(
    setting: str, found: dict[str, list[dict[str, list[float]]]]
) -> dict[str, tuple[list[Column], list[dict[str, Cell]]]]:
    """Title -> columns and rows."""
    metrics = list(found)
    columns = [Column("band", "masked"), *(Column(metric, metric) for metric in metrics)]

    def rows(pick: str) -> list[dict[str, Cell]]:
        made: list[dict[str, Cell]] = []
        for number, band in enumerate(BANDS):
            row: dict[str, Cell] = {"band": band_name(band)}
            for metric in metrics:
                row[metric] = spread([value_of(run, pick, number) for run in found[metric]])
            made.append(row)
        return made

    made = {
        "Table 1, ranked over all data": (columns, rows("global")),
        "Table 2, ranked for each category, mean": (columns, rows("categories")),
    }
    best = "deeplift" if "deeplift" in metrics else metrics[-1]
    single = [c for c in map(str, SINGLE) if c in found[best][0]]
    made[f"Table 3, single categories ({best})"] = (
        [Column("band", "masked"), *(Column(c, f"category {int(c) + 1}") for c in single)],
        [
            {"band": band_name(band)}
            | {c: spread([run[c][number] for run in found[best]]) for c in single}
            for number, band in enumerate(BANDS)
        ],
    )
    for title, (header, values) in targets.PILOT.items():
        if setting == "vgg16-cifar10":
            made[f"the paper's {title}"] = (
                [Column("band", "masked"), *(Column(name, name) for name in header)],
                [
                    {"band": band_name(band)} | dict(zip(header, line, strict=True))
                    for band, line in zip(BANDS, values, strict=True)
                ],
            )
    return made


def value_of(run: dict[str, list[float]], pick: str, band: int) -> float:
    if pick == "global":
        return run["global"][band]
    values = [found[band] for name, found in run.items() if name != "global"]
    return sum(values) / len(values)


def report(
    setting: Setting,
    data: Data,
    made: dict[str, tuple[list[Column], list[dict[str, Cell]]]],
    seeds: Sequence[int],
    output: Path,
) -> None:
    """Print the tables and write them to one result file."""
    first, *_ = made
    path = output / f"pilot-{setting.name}.json"
    results.write(
        path, f"Pilot study, {setting.name}: {first}", *made[first], seeds=seeds,
        device=data.train.labels.device,
        options={"profiled": setting.profiled, "recipe": asdict(setting.recipe),
                 "data": data.origin},
        tables={
            title: {"columns": [asdict(c) for c in columns], "rows": rows}
            for title, (columns, rows) in made.items()
        },
    )  # fmt: skip
    for title, (columns, rows) in made.items():
        print(f"\n{setting.name}, {title}: accuracy, %\n")
        print(tables.text_table(columns, rows))
    print(f"\n{path} written\n")


def parser() -> argparse.ArgumentParser:
    parser = common(__doc__, seeds=3)
    add_metrics(parser)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    asked = parser().parse_args(words)
    seeds, metrics = checked_seeds(asked.seeds), asked.metrics.split(",")
    device = usable_device(asked.device)
    for setting in chosen(asked.settings):
        setting = setting.with_epochs(asked.epochs)
        data = load(setting.data, asked.data, cache=asked.cache).to(device)
        data = data.measured_with(asked.evaluated)
        found = run_setting(setting, data, seeds, metrics, asked.cache)
        report(setting, data, tables_of(setting.name, found), seeds, asked.output)


if __name__ == "__main__":
    run(main)
