"""``nss-prune sensitivity``: how far the outputs move with a share of each layer gone."""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import Any

from nss_prune.cli.console import Console, Outcome, table
from nss_prune.cli.data import example_for
from nss_prune.cli.options import (
    add_data_options,
    add_model_options,
    add_pruner_options,
    data_source,
    model_source,
    pruner_arguments,
)
from nss_prune.core.replacing import replacing, write_text
from nss_prune.core.text import shortened
from nss_prune.errors import ArgumentError
from nss_prune.pruner.page.document import sensitivity_page
from nss_prune.pruner.plots import plot_sensitivity
from nss_prune.pruner.pruner import NSSPruner
from nss_prune.pruner.sensitivity import SHARES

STAGES = 3
AIMS = ("budget", "max_divergence", "min_score", "max_drop")  # what asks for a size

PICTURES = (".png", ".svg", ".pdf")

Table = dict[str, dict[float, float]]


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model_options(parser)
    add_data_options(parser)
    add_pruner_options(parser)
    parser.add_argument("-o", "--output", metavar="FILE",
        help="the table as .csv, .json or .html, or a plot as .png, .svg or .pdf")  # fmt: skip


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """The table, in nats a sample."""
    source = data_source(options)
    if source is None:
        raise ArgumentError("sensitivity is measured on data; pass --data DIR")
    kinds = (".csv", ".json", ".html", *PICTURES)
    if options.output and Path(options.output).suffix not in kinds:
        raise ArgumentError(f"{options.output!r} ends otherwise; give one of {', '.join(kinds)}")
    console.stage(f"loading {options.model}")
    model = model_source(options).load().to(options.device)
    console.stage("reading the data")
    batches, _ = source.load(model, options.input_size)
    example = example_for(model, options.input_size, batches)
    console.stage("measuring")
    given = pruner_arguments(options, model)
    aim: dict[str, Any] = {} if any(name.endswith(AIMS) for name in given) else {"macs_budget": 0.5}
    pruner = NSSPruner(
        model, example, data=batches, strategy="divergence", progress=console.progress,
        **aim, **{name: value for name, value in given.items() if name != "strategy"},
    )  # fmt: skip
    sensitivity = pruner.sensitivity
    assert sensitivity is not None  # the strategy predicts it
    found = sensitivity.by_layer
    if options.output:
        write(found, options.output)
    rows = [
        (shortened(layer, 40), *(f"{by_share[x]:.3g}" if x in by_share else "" for x in SHARES))
        for layer, by_share in found.items()
    ]
    header = ("nats with this share gone", *(f"{share:.0%}" for share in SHARES))
    worst = max(found, key=lambda layer: found[layer].get(0.5, 0.0))
    values = {"sensitivity": {layer: _keyed(by_share) for layer, by_share in found.items()}}
    todo = f"leave the most sensitive layer alone with --ignored-layers {worst}, or prune as it is"
    return Outcome(table(header, rows), values, todo)


def _keyed(by_share: dict[float, float]) -> dict[str, float]:
    return {f"{share:g}": nats for share, nats in by_share.items()}


def write(found: Table, path: str) -> None:
    """Write the table in the form that the file's ending says, whole or not at all."""
    kind = Path(path).suffix
    if kind == ".csv":
        write_text(path, _csv(found))
    elif kind == ".json":
        keyed = {layer: _keyed(by_share) for layer, by_share in found.items()}
        write_text(path, json.dumps(keyed, indent=2))
    elif kind == ".html":
        write_text(path, sensitivity_page(found, "Sensitivity of each layer"))
    else:
        figure: Any = plot_sensitivity(found)
        with replacing(path) as aside:
            figure.savefig(aside)


def _csv(found: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["layer", *SHARES])
    for layer, by_share in found.items():
        writer.writerow([layer, *(by_share.get(share, "") for share in SHARES)])
    return text.getvalue()
