"""``nss-prune evaluate``: accuracy, latency and size, beside the whole model's."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from nss_prune.cli.console import Console, Outcome, table
from nss_prune.cli.data import example_for
from nss_prune.cli.measure import Measured, as_onnx, in_torch, measured, onnx_file
from nss_prune.cli.options import (
    add_data_options,
    add_model_options,
    data_source,
    model_source,
    whole_source,
)
from nss_prune.errors import ArgumentError

STAGES = 4


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model_options(parser)
    add_data_options(parser)
    add = parser.add_argument
    add("--whole", metavar="MODEL",
        help="the model to compare with, which --weights, --weights-by-order and --pretrained "
        "then are of; their calls are timed in turns")  # fmt: skip
    add("--runtime", choices=("torch", "onnxruntime"), default="torch",
        help="what runs the models (default: torch)")  # fmt: skip


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """Measure one model, or two side by side."""
    own = model_source(options, options.whole)
    sources = [own] if not options.whole else [own, whole_source(options, options.whole)]
    onnx = [Path(source.name).suffix == ".onnx" for source in sources]
    if any(onnx) and not all(onnx):
        raise ArgumentError(
            "one of two models is an ONNX file; give two, or none with --runtime onnxruntime"
        )
    console.stage("loading")
    models: dict[str, Any] = {
        source.name: None if is_onnx else source.load().to(options.device)
        for source, is_onnx in zip(sources, onnx, strict=True)
    }
    console.stage("reading the data")
    first = next((model for model in models.values() if model is not None), None)
    data = _data(options, first)
    example = None if first is None else example_for(first, options.input_size, data)
    console.stage("preparing")
    runtime = "onnxruntime" if any(onnx) else options.runtime
    with contextlib.ExitStack() as stack:
        prepare = as_onnx if runtime == "onnxruntime" else in_torch
        ready = {
            name: onnx_file(name) if model is None
            else stack.enter_context(prepare(model, example))
            for name, model in models.items()
        }  # fmt: skip
        console.stage("measuring " + " and ".join(models))
        found = measured(ready, data, console.progress)
    values = {name: one.to_dict() for name, one in found.items()}
    todo = f"nss-prune export {options.model} -o model.onnx" if not any(onnx) else ""
    return Outcome(_text(found, runtime), values, todo)


def _data(options: argparse.Namespace, model: Any) -> Any:
    source = data_source(options)
    if source is None:
        return None
    if model is None:
        raise ArgumentError(
            "the pictures are prepared as a model of timm says; for ONNX files without one give "
            "--data with the .safetensors file and --runtime onnxruntime"
        )
    batches, held_out = source.load(model, options.input_size)
    return batches if held_out is None else held_out


def _text(found: dict[str, Measured], runtime: str) -> str:
    measured = list(found.values())
    rows = [
        ("parameters", *(_count(one.parameters) for one in measured)),
        ("MACs of a call", *(_count(one.macs) for one in measured)),
        ("MB", *(f"{one.bytes / 1e6:.2f}" for one in measured)),
        (f"ms of a call, {runtime}", *(one.seconds.text for one in measured)),
        ("accuracy",
         *("" if one.accuracy is None else f"{one.accuracy:.2%}" for one in measured)),
    ]  # fmt: skip
    shown = [row for row in rows if any(row[1:])]
    rounds = measured[0].seconds.rounds
    about = f"ms: median (quartiles) of {rounds} calls"
    return f"{table(('', *found), shown)}\n{about}{', in turns' if len(found) > 1 else ''}"


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
