"""``nss-prune evaluate``: accuracy, latency and size, beside the whole model's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nss_prune.cli.console import Console, Outcome, table
from nss_prune.cli.data import example_for
from nss_prune.cli.measure import Measured, measured, measured_as_onnx, measured_onnx
from nss_prune.cli.models import ModelSource
from nss_prune.cli.options import add_data_options, add_model_options, data_source, model_source
from nss_prune.errors import ArgumentError

STAGES = 4


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model_options(parser)
    add_data_options(parser)
    add = parser.add_argument
    add("--whole", metavar="MODEL",
        help="the model to compare with, which --weights, --weights-by-order and --pretrained "
        "then are of")  # fmt: skip
    add("--runtime", choices=("torch", "onnxruntime"), default="torch",
        help="what runs the models (default: torch)")  # fmt: skip


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """Measure one model, or two side by side."""
    sources = _sources(options)
    onnx = [Path(name).suffix == ".onnx" for name in sources]
    if any(onnx) and not all(onnx) and options.whole:
        raise ArgumentError(
            "one of two models is an ONNX file; give two, or none with --runtime onnxruntime"
        )
    console.stage("loading")
    models: dict[str, Any] = {
        name: None if is_onnx else source.load().to(options.device)
        for (name, source), is_onnx in zip(sources.items(), onnx, strict=True)
    }
    console.stage("reading the data")
    first = next((model for model in models.values() if model is not None), None)
    data = _data(options, first)
    example = None if first is None else example_for(first, options.input_size, data)
    found = {}
    for name, model in models.items():
        console.stage(f"measuring {name}")
        if model is None:
            found[name] = measured_onnx(name, data, console.progress)
        elif options.runtime == "onnxruntime":
            found[name] = measured_as_onnx(model, example, data, console.progress)
        else:
            found[name] = measured(model, example, data, console.progress)
    values = {name: one.to_dict() for name, one in found.items()}
    todo = f"nss-prune export {options.model} -o model.onnx" if not any(onnx) else ""
    return Outcome(_text(found, options.runtime if not any(onnx) else "onnxruntime"), values, todo)


def _sources(options: argparse.Namespace) -> dict[str, ModelSource]:
    """Name -> source, the model first."""
    source = model_source(options)
    if not options.whole:
        return {source.name: source}
    whole = ModelSource(
        options.whole,
        options.weights,
        options.weights_by_order,
        options.pretrained,
        options.num_classes,
    )
    own = ModelSource(source.name, num_classes=options.num_classes, structure=options.structure)
    return {own.name: own, whole.name: whole}


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
    rows = [
        ("parameters", *(_count(one.parameters) for one in found.values())),
        ("MACs of a call", *(_count(one.macs) for one in found.values())),
        ("MB", *("" if one.bytes is None else f"{one.bytes / 1e6:.2f}" for one in found.values())),
        (f"ms of a call, {runtime}",
         *("" if one.seconds is None else f"{one.seconds * 1e3:.2f}" for one in found.values())),
        ("accuracy",
         *("" if one.accuracy is None else f"{one.accuracy:.2%}" for one in found.values())),
    ]  # fmt: skip
    shown = [row for row in rows if any(row[1:])]
    return table(("", *found), shown)


def _count(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
