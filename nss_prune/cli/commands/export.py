"""``nss-prune export``: a model as ONNX, or as torch.export's program."""

from __future__ import annotations

import argparse
from pathlib import Path

from nss_prune.cli.console import Console, Outcome
from nss_prune.cli.data import example_for
from nss_prune.cli.exporting import export_onnx, export_torch, onnx_matches
from nss_prune.cli.options import add_model_options, model_source
from nss_prune.errors import ArgumentError, NSSPruneError

STAGES = 3

ALIKE = 1e-3
"""Difference of the outputs, as a share of the largest, up to which a file is as good."""


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model_options(parser)
    add = parser.add_argument
    add("-o", "--output", metavar="FILE", help="FILE.onnx, or FILE.pt2 for torch.export")
    add("--dynamic-batch", action="store_true", help="leave the number of samples open")


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """Write the file; an ONNX file is compared with the model where onnxruntime is installed."""
    kind = Path(options.output or "").suffix
    if kind not in (".onnx", ".pt2"):
        raise ArgumentError(f"the output is {options.output!r}; pass -o FILE.onnx or FILE.pt2")
    console.stage(f"loading {options.model}")
    model = model_source(options).load().to(options.device)
    example = example_for(model, options.input_size)
    console.stage(f"writing {options.output}")
    export = export_onnx if kind == ".onnx" else export_torch
    export(model, example, options.output, dynamic=options.dynamic_batch)
    console.stage("comparing")
    difference = None
    if kind == ".onnx":
        difference = _difference(model, example, options.output)
    size = Path(options.output).stat().st_size
    text = f"{options.output}: {size / 1e6:.2f} MB"
    if difference is not None:
        text += f", outputs within {difference:.1e} of torch's"
    values = {"output": options.output, "bytes": size, "difference": difference}
    todo = (
        f"onnxruntime.InferenceSession({options.output!r})"
        if kind == ".onnx"
        else f"torch.export.load({options.output!r}).module()"
    )
    return Outcome(text, values, todo)


def _difference(model: object, example: object, path: str) -> float | None:
    try:
        found = onnx_matches(model, example, path)  # type: ignore[arg-type]
    except ArgumentError:  # onnxruntime is not installed
        return None
    if not found <= ALIKE:
        raise NSSPruneError(
            f"{path!r} was written, but its outputs differ from torch's by {found:.1e} of the "
            "largest; do not deploy it, and try FILE.pt2"
        )
    return found
