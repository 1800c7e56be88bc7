"""The options that commands share, and those of NSSPruner, from the command line or YAML."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from torch import nn

from nss_prune.cli.data import DataSource
from nss_prune.cli.models import ModelSource
from nss_prune.cli.objects import imported, is_object, made
from nss_prune.core.models import submodule
from nss_prune.errors import ArgumentError
from nss_prune.profiling.profile import Profile


def plain(text: str) -> Any:
    """A value as YAML has it: 0.5, true, null, [a, b], {a: 1}; other text is itself."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _value(given: Any, model: nn.Module) -> Any:
    return imported(given) if is_object(given) else given


def _object(given: Any, model: nn.Module) -> Any:
    return made(given) if is_object(given) else given


def _objects(given: Any, model: nn.Module) -> Any:
    items = given if isinstance(given, list) else [given]
    return [_object(item, model) for item in items]


def _layers(given: Any, model: nn.Module) -> Any:
    items = given if isinstance(given, list) else str(given).split(",")
    return [_value(item, model) for item in items]


def _numbers(given: Any, model: nn.Module) -> Any:
    items = given if isinstance(given, list) else str(given).split(",")
    return [int(item) for item in items]


def _by_layer(given: Any, model: nn.Module) -> Any:
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{given!r} is no mapping; give {{layer: value}}")
    return {submodule(model, name): value for name, value in given.items()}


def _pruners(given: Any, model: nn.Module) -> Any:
    by_layer = _by_layer({} if not isinstance(given, Mapping) else given, model)
    return {layer: _object(value, model) for layer, value in by_layer.items()}


def _by_parameter(given: Any, model: nn.Module) -> Any:
    if not isinstance(given, Mapping):
        raise ArgumentError(f"{given!r} is no mapping; give {{parameter: axis}}")
    known = dict(model.named_parameters())
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ArgumentError(f"the model has no parameter {unknown[0]!r}; give names of parameters")
    return [(known[name], axis) for name, axis in given.items()]


def _profile(given: Any, model: nn.Module) -> Any:
    return Profile.load(given)


@dataclass(frozen=True)
class PrunerOption:
    """An option of NSSPruner.

    Attributes:
        name: Of the argument.
        help: What it says.
        kind: Turns the text into a value; :func:`plain` for YAML.
        resolved: (value, model) -> what NSSPruner is given.
    """

    name: str
    help: str
    kind: Callable[[str], Any] = plain
    resolved: Callable[[Any, nn.Module], Any] = _value


PRUNER_OPTIONS = (
    PrunerOption("theta", "similarity threshold in (0, 1]", float),
    PrunerOption("pruning_ratio", "share of the neurons to remove, in [0, 1)", float),
    PrunerOption("macs_budget", "share of the multiply-accumulates to keep, in (0, 1]", float),
    PrunerOption("params_budget", "share of the parameters to keep, in (0, 1]", float),
    PrunerOption("latency_budget", "share of the seconds of a call to keep, in (0, 1]", float),
    PrunerOption("budget", "share of --cost to keep, in (0, 1]", float),
    PrunerOption("cost", "macs, parameters, latency or module:Class", str, _object),
    PrunerOption("max_divergence", "nats a sample that the outputs may diverge by", float),
    PrunerOption("score", "module:function of a model, larger for better", str),
    PrunerOption("min_score", "score that the smaller model must have", float),
    PrunerOption("max_drop", "score that the smaller model may lose", float),
    PrunerOption("classes", "those that the smaller model is for, 3,7,12", plain, _numbers),
    PrunerOption("keep_head", "true: keep the outputs of all classes"),
    PrunerOption("importance", "module:Class, such as "
                 "torch_pruning.importance:GroupMagnitudeImportance", str, _object),
    PrunerOption("metric", "contribution metric: taylor, avg, var, ens, deeplift", str, _object),
    PrunerOption("strategy", "semantic, category, global, divergence or module:Class", str,
                 _object),
    PrunerOption("categories", "labels, predicted, null or module:function"),
    PrunerOption("features", "pixel, pooled or flat", str),
    PrunerOption("ranking", "magnitude or signed", str),
    PrunerOption("loss", "module:function of (outputs, labels)", str),
    PrunerOption("outputs", "what the outputs mean: classes, labels, values or module:function"),
    PrunerOption("fold", "true, false or refit"),
    PrunerOption("recalibrate", "true: move the statistics of BatchNorms"),
    PrunerOption("balance", "true: keep each class's mean probability"),
    PrunerOption("repairs", "module:Class of repairs of your own", plain, _objects),
    PrunerOption("profile", "file that nss-prune profile wrote", str, _profile),
    PrunerOption("timeout", "seconds that tracing the model may take", float),
    PrunerOption("memory_limit", "bytes for the sums of a pass", float),
    PrunerOption("checkpoint", "folder from which a run that was broken off goes on", str),
    PrunerOption("adapters", "module:Class of structures of your own", plain, _objects),
    PrunerOption("global_pruning", "true: one ranking for all layers"),
    PrunerOption("pruning_ratio_dict", "{layer: ratio}", plain, _by_layer),
    PrunerOption("max_pruning_ratio", "share that a layer may lose at most", float),
    PrunerOption("iterative_steps", "number of steps, each measured anew", int),
    PrunerOption("iterative_pruning_ratio_scheduler", "module:function", str),
    PrunerOption("ignored_layers", "names of layers to leave alone, a,b,c", plain, _layers),
    PrunerOption("round_to", "keep neurons in multiples of this, or auto"),
    PrunerOption("isomorphic", "true: one ranking for layers of one structure"),
    PrunerOption("in_channel_groups", "{layer: groups}", plain, _by_layer),
    PrunerOption("out_channel_groups", "{layer: groups}", plain, _by_layer),
    PrunerOption("num_heads", "{layer: heads}", plain, _by_layer),
    PrunerOption("prune_num_heads", "true: remove whole heads of attention"),
    PrunerOption("prune_head_dims", "true: remove channels inside of heads"),
    PrunerOption("head_pruning_ratio", "share of the heads to remove", float),
    PrunerOption("head_pruning_ratio_dict", "{layer: ratio}", plain, _by_layer),
    PrunerOption("customized_pruners", "{layer: module:Class}", plain, _pruners),
    PrunerOption("unwrapped_parameters", "{parameter: axis}", plain, _by_parameter),
    PrunerOption("root_module_types", "module:Class of layers to prune", plain, _layers),
    PrunerOption("forward_fn", "module:function of (model, inputs)", str),
    PrunerOption("output_transform", "module:function of the outputs", str),
)  # fmt: skip
"""All arguments of NSSPruner and of torch-pruning's pruners that a command line can give."""


def add_pruner_options(parser: argparse.ArgumentParser) -> None:
    """``--theta``, ``--macs-budget`` and so on; values are written as in YAML."""
    group = parser.add_argument_group("options of NSSPruner")
    for option in PRUNER_OPTIONS:
        flag = f"--{option.name.replace('_', '-')}"
        group.add_argument(flag, type=option.kind, help=option.help, metavar="VALUE")


def pruner_arguments(options: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Keywords of NSSPruner, of the options that were given.

    Raises:
        ArgumentError, ModelMismatchError: One names what there is not.
    """
    return {
        option.name: option.resolved(given, model)
        for option in PRUNER_OPTIONS
        if (given := getattr(options, option.name, None)) is not None
    }


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and what it takes to make it."""
    parser.add_argument("model", nargs="?", metavar="MODEL",
        help="name of a model of timm or torchvision, module:function for one of your own, or the "
        ".safetensors file of a pruned model")  # fmt: skip
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--weights", metavar="FILE", help="its weights: safetensors, or a state dict of torch.save")
    add("--weights-by-order", action="store_true",
        help="take the tensors of that file in their order, whatever they are called")  # fmt: skip
    add("--pretrained", action="store_true", help="let timm or torchvision fetch weights")
    add("--num-classes", type=int, metavar="N", help="classes of the model")
    add("--structure", metavar="MODEL",
        help="for a pruned file that names no timm model: the model that was pruned")  # fmt: skip
    add("--input-size", type=int, nargs=3, metavar=("C", "H", "W"),
        help="of a picture (default: the model's)")  # fmt: skip
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """``--data`` and how it is read."""
    group = parser.add_argument_group("the data")
    add = group.add_argument
    add("--data", metavar="DIR",
        help="folder with a folder of pictures for each class (in DIR/train and DIR/val, or all "
        "in DIR), or module:function that returns batches of (inputs, labels)")  # fmt: skip
    add("--eval-data", metavar="DIR", help="to measure accuracy with (default: DIR/val, or a part)")
    add("--held-out", type=float, default=0.2, metavar="SHARE",
        help="of the pictures, to measure with where there is no DIR/val (0.2)")  # fmt: skip
    add("--samples", type=int, metavar="N", help="pictures to prune with at most")
    add("--eval-samples", type=int, metavar="N", help="pictures to measure with at most")
    add("--batch-size", type=int, default=32, metavar="N")
    add("--workers", type=int, default=0, metavar="N", help="processes that read pictures")
    add("--seed", type=int, default=0, help="for which pictures are taken (default: 0)")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """``--config``, ``--json`` and ``--quiet``."""
    group = parser.add_argument_group("in general")
    add = group.add_argument
    add("--config", metavar="FILE", help="YAML with any of these options; the command line wins")
    add("--json", action="store_true", help="the result as JSON, on stdout")
    add("--quiet", action="store_true", help="say nothing on stderr while at work")


def model_source(options: argparse.Namespace) -> ModelSource:
    """Where the model comes from.

    Raises:
        ArgumentError: None is named.
    """
    if not options.model:
        raise ArgumentError(
            "no model is given; name one of timm or torchvision, module:function, or a pruned file"
        )
    return ModelSource(
        options.model,
        options.weights,
        options.weights_by_order,
        options.pretrained,
        options.num_classes,
        options.structure,
    )


def data_source(options: argparse.Namespace) -> DataSource | None:
    """Where the data comes from, or None where none is given."""
    if not options.data:
        return None
    if not 0 <= options.held_out < 1:
        raise ArgumentError(f"--held-out is {options.held_out}; give a share in [0, 1)")
    return DataSource(
        options.data,
        options.eval_data,
        options.held_out,
        options.samples,
        options.eval_samples,
        options.batch_size,
        options.workers,
        options.seed,
    )
