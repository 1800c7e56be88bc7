"""The options of a fine-tuning, from the command line or YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from nss_prune.cli.objects import made
from nss_prune.cli.options import Option, dtype_of, plain
from nss_prune.errors import ArgumentError


def _scheduler(given: Any, model: nn.Module) -> str | None:
    return None if given == "none" else given


def _metrics(given: Any, model: nn.Module) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ArgumentError(f"metrics is {given!r}; give {{name: module:Class}}")
    return {
        str(name): made(value) if isinstance(value, str) else value for name, value in given.items()
    }


TRAINING_OPTIONS = (
    Option("epochs", "passes over the data, those of a checkpoint included (10)", int),
    Option("optimizer", "a name that timm knows (adamw), or module:function of the parameters",
           str),
    Option("learning_rate", "of the optimiser (0.001)", float),
    Option("momentum", "of the optimiser (0.9)", float),
    Option("weight_decay", "of the optimiser, but for biases and norms (0)", float),
    Option("scheduler", "a name that timm knows (cosine), or none", str, _scheduler),
    Option("warmup_epochs", "in which the rate rises to its full value (0)", int),
    Option("loss", "a name of timm's, such as BinaryCrossEntropy, or module:function of "
           "(outputs, labels)", str),
    Option("amp", "bfloat16 or float16: mixed precision", str,
           dtype_of("amp", "bfloat16", "float16")),
    Option("clip_norm", "largest norm of the gradient", float),
    Option("patience", "epochs without a better score after which it stops", int),
    Option("restore_best", "false: keep the last epoch, not the best"),
    Option("distillation", "weight of the teacher's outputs beside the labels', in [0, 1] (0.5)",
           float),
    Option("temperature", "by which scores are divided (2)", float),
    Option("features", "weight of what the layers receive that lost inputs (0)", float),
    Option("mixup", "its alpha (0)", float),
    Option("cutmix", "its alpha (0)", float),
    Option("smoothing", "of the labels, in [0, 1) (0)", float),
    Option("ema", "decay of an average of the parameters, such as 0.999", float),
    Option("metrics", "{name: module:Class} of torchmetrics", plain, _metrics),
    Option("monitor", "the metric that says which epoch is best; -name where less is better", str),
    Option("log", "folder for history.csv, and for TensorBoard where it is installed", str),
    Option("checkpoint", "file that is written after every epoch", str),
)  # fmt: skip
"""All arguments of finetune that a command line can give, but for ``resume``, a flag."""
