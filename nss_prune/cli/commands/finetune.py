"""``nss-prune finetune``: train a smaller model on, by labels and by the whole model."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nss_prune.cli.config import write_config
from nss_prune.cli.console import Console, Outcome, table
from nss_prune.cli.measure import model_accuracy
from nss_prune.cli.options import (
    add_data_options,
    add_model_options,
    add_named_options,
    data_source,
    model_source,
    named_arguments,
    whole_source,
)
from nss_prune.cli.output import output_path
from nss_prune.cli.training import TRAINING_OPTIONS
from nss_prune.cli.versions import versions
from nss_prune.core.replacing import write_text
from nss_prune.errors import ArgumentError
from nss_prune.finetuning.finetune import FinetuneResult, finetune
from nss_prune.pruner.checkpoint import save_pruned

STAGES = 5


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model_options(parser)
    add_data_options(parser)
    add_named_options(parser, TRAINING_OPTIONS, "options of finetune")
    add = parser.add_argument
    add("--teacher", metavar="MODEL",
        help="the whole model to learn from, a name or a file, which --weights, "
        "--weights-by-order and --pretrained then are of")  # fmt: skip
    add("--augment", action="store_true",
        help="train with timm's random crops and mirror images")  # fmt: skip
    add("--resume", action="store_true", help="go on from --checkpoint where it is there")
    add("-o", "--output", metavar="FILE.safetensors", help="where the model is written")


def run(options: argparse.Namespace, console: Console) -> Outcome:
    """Train the model, and write it with its configuration and its history."""
    output = output_path(options.output)
    source = data_source(options)
    if source is None:
        raise ArgumentError("fine-tuning takes data; pass --data DIR")
    console.stage(f"loading {options.model}")
    model = model_source(options, options.teacher).load().to(options.device)
    teacher = None
    if options.teacher:
        teacher = whole_source(options, options.teacher).load().to(options.device)
    arguments = named_arguments(options, TRAINING_OPTIONS, model)
    console.stage("reading the data")
    batches, held_out = source.load(
        model, options.input_size, training=True, augment=options.augment
    )
    console.stage("accuracy before" if held_out else "no held-out labels, no accuracy")
    before = None if held_out is None else model_accuracy(model, held_out, console.progress)
    console.stage("training")
    with seeded(options.seed):
        result = finetune(
            model, batches, teacher, held_out,
            resume=options.resume, progress=console.progress, **arguments,
        )  # fmt: skip
    console.stage(f"writing {output}")
    values = _values(options, before, result)
    _write(model, output, options, values)
    todo = f"nss-prune export {output} -o {output.with_suffix('.onnx')}"
    return Outcome(_text(before, result), values, todo)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the context, random numbers are those of a seed; timm's crops draw by ``random``."""
    state = random.getstate()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            yield
    finally:
        random.setstate(state)


def _write(
    model: nn.Module, output: Path, options: argparse.Namespace, values: dict[str, Any]
) -> None:
    save_pruned(model, output)
    write_config(output.with_suffix(".yaml"), options, options.parser)
    own = {**values, "command": options.command_line, "versions": versions()}
    write_text(output.with_suffix(".json"), json.dumps(own, indent=1))


def _values(
    options: argparse.Namespace, before: float | None, result: FinetuneResult
) -> dict[str, Any]:
    return {
        "output": str(options.output),
        "accuracy": None if before is None else [before, result.metrics.get("accuracy")],
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "stopped_early": result.stopped_early,
        "seconds": result.seconds,
        "history": [dict(metrics) for metrics in result.history],
    }


def _text(before: float | None, result: FinetuneResult) -> str:
    hidden = () if before is None else ("score",)
    names = [name for name in result.history[0] if name not in hidden]
    rows = [tuple(f"{metrics[name]:.4g}" for name in names) for metrics in result.history]
    lines = [table(tuple(names), rows), ""]
    if before is not None and "accuracy" in result.metrics:
        lines.append(f"accuracy: {before:.2%} -> {result.metrics['accuracy']:.2%}")
    best = "" if result.best_epoch is None else f", the best is epoch {result.best_epoch}"
    early = ", stopped early" if result.stopped_early else ""
    lines.append(f"{result.epochs} epochs in {result.seconds:.1f} s{early}{best}")
    return "\n".join(lines)
