"""``nss-prune prune``: a smaller model in a file, with its configuration and its report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import nn

from nss_prune.cli.config import write_config
from nss_prune.cli.console import Console, Outcome
from nss_prune.cli.data import example_for
from nss_prune.cli.measure import model_accuracy, seconds_in_turns
from nss_prune.cli.options import (
    add_data_options,
    add_model_options,
    add_pruner_options,
    data_source,
    model_source,
    pruner_arguments,
)
from nss_prune.cli.output import output_path
from nss_prune.cli.versions import versions
from nss_prune.core.replacing import write_text
from nss_prune.pruner.checkpoint import save_pruned
from nss_prune.pruner.hub import save_pretrained
from nss_prune.pruner.pruner import NSSPruner
from nss_prune.pruner.report import Report

STAGES = 7


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model_options(parser)
    add_data_options(parser)
    add_pruner_options(parser)
    add = parser.add_argument
    add("-o", "--output", metavar="FILE.safetensors", help="where the smaller model is written")
    add("--report", metavar="FILE.html", help="where the report is written")
    add("--folder", metavar="DIR",
        help="write the model as the Hugging Face hub has them too, with a model card")  # fmt: skip


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """Prune the model, and write it with what made it."""
    output = output_path(options.output, options.report)
    console.stage(f"loading {options.model}")
    model = model_source(options).load().to(options.device)
    arguments = pruner_arguments(options, model)
    console.stage("reading the data")
    source = data_source(options)
    batches, held_out = (None, None) if source is None else source.load(model, options.input_size)
    example = example_for(model, options.input_size, batches)
    console.stage("accuracy of the whole model" if held_out else "no held-out labels, no accuracy")
    whole = None if held_out is None else model_accuracy(model, held_out, console.progress)
    console.stage("pruning")
    report = pruned(model, example, batches, arguments, console)
    console.stage(
        "accuracy of the smaller model" if held_out else "no held-out labels, no accuracy"
    )
    if held_out is not None:
        smaller = model_accuracy(model, held_out, console.progress)
        report = report.with_figures(accuracy=(whole, smaller))
    console.stage("timing both models in turns")
    if "forward_fn" not in arguments:
        both = model_source(options).load().to(options.device), model
        report = report.with_figures(latency=seconds_in_turns(both, example))
    report = report.with_figures(command=options.command_line, versions=versions())
    console.stage(f"writing {output}")
    save_pruned(model, output)
    write_config(output.with_suffix(".yaml"), options, options.parser)
    write_text(output.with_suffix(".json"), json.dumps(report.to_dict(), indent=1))
    if options.folder:
        save_pretrained(model, options.folder, report)
    if options.report:
        report.to_html(options.report, f"{options.model}, pruned")
    values = {"output": str(output), "report": report.to_dict()}
    return Outcome(str(report), values, _todo(options, output, report))


def pruned(
    model: nn.Module, example: Any, batches: Any, arguments: dict[str, Any], console: Console
) -> Report:
    """Prune a model in place, in all steps; the report is of all of them."""
    pruner = NSSPruner(model, example, data=batches, progress=console.progress, **arguments)
    for step in range(pruner.iterative_steps):
        if pruner.iterative_steps > 1:
            console.say(f"    step {step + 1} of {pruner.iterative_steps}")
        pruner.step()
    report = pruner.cumulative_report
    assert report is not None
    return report


def _todo(options: argparse.Namespace, output: Path, report: Report) -> str:
    if report.slower:
        other = f"nss-prune evaluate {output} --runtime onnxruntime"
        return f"not faster in torch here: {other}, or prune by seconds, --latency-budget 0.6"
    if options.report:
        return f"open {options.report}; nss-prune export {output} -o {output.with_suffix('.onnx')}"
    return f"nss-prune export {output} -o {output.with_suffix('.onnx')}"
