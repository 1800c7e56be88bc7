"""``nss-prune profile``: what each neuron contributes to each category, in a file."""

from __future__ import annotations

import argparse

from nss_prune.cli.console import Console, Outcome
from nss_prune.cli.data import example_for
from nss_prune.cli.options import (
    add_data_options,
    add_model_options,
    data_source,
    model_source,
    plain,
)
from nss_prune.errors import ArgumentError
from nss_prune.profiling.run import profile

STAGES = 4


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model_options(parser)
    add_data_options(parser)
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", help="where the profile is written (safetensors)")
    add("--metrics", default="taylor", help="comma list: taylor, avg, var, ens, deeplift")
    add("--categories", type=plain, default="labels", help="labels, predicted or null")
    add("--theta", type=float, default=0.95, help="of the slice that is shown (default: 0.95)")


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """Profile the model."""
    source = data_source(options)
    if source is None or not options.output:
        raise ArgumentError("profile needs --data DIR and -o FILE")
    console.stage(f"loading {options.model}")
    model = model_source(options).load().to(options.device)
    console.stage("reading the data")
    batches, _ = source.load(model, options.input_size)
    example = example_for(model, options.input_size, batches)
    console.stage("profiling")
    found = profile(
        model,
        batches,
        example,
        metrics=tuple(options.metrics.split(",")),
        categories=options.categories,
        progress=console.progress,
    )
    console.stage(f"writing {options.output}")
    found.save(options.output)
    critical = found.slice(options.theta)
    values = {
        "output": options.output,
        "layers": found.layers,
        "categories": [list(part) for part in found.categories],
        "samples": found.used,
        "theta": options.theta,
        "kept": {name: int(kept.sum()) for name, kept in critical.kept.items()},
    }
    todo = (
        f"nss-prune prune {options.model} --profile {options.output} --theta {options.theta} -o ..."
    )
    return Outcome(f"{found!r}\n\n{critical!r}", values, todo)
