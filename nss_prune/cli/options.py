"""The options that commands share, and those of NSSPruner, from the command line or YAML."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
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


def dtype_of(option: str, *names: str) -> Callable[[Any, nn.Module], torch.dtype]:
    """What resolves the value of an option to one of these dtypes."""

    def resolved(given: Any, model: nn.Module) -> torch.dtype:
        if given not in names:
            known = f"{', '.join(names[:-1])} or {names[-1]}"
            raise ArgumentError(f"{option} is {given!r}; give {known}")
        found: torch.dtype = getattr(torch, given)
        return found

    return resolved


def _profile(given: Any, model: nn.Module) -> Any:
    return Profile.load(given)


@dataclass(frozen=True)
class Option:
    """An option that stands for an argument of a function.

    Attributes:
        name: Of the argument.
        help: What it says.
        kind: Turns the text into a value; :func:`plain` for YAML.
        resolved: (value, model) -> what the function is given.
    """

    name: str
    help: str
    kind: Callable[[str], Any] = plain
    resolved: Callable[[Any, nn.Module], Any] = _value


PRUNER_OPTIONS = (
    Option("theta", "similarity threshold in (0, 1]", float),
    Option("pruning_ratio", "share of the neurons to remove, in [0, 1)", float),
    Option("macs_budget", "share of the multiply-accumulates to keep, in (0, 1]", float),
    Option("params_budget", "share of the parameters to keep, in (0, 1]", float),
    Option("latency_budget", "share of the seconds of a call to keep, in (0, 1]", float),
    Option("budget", "share of --cost to keep, in (0, 1]", float),
    Option("cost", "macs, parameters, latency or module:Class", str, _object),
    Option("max_divergence", "nats a sample that the outputs may diverge by", float),
    Option("score", "module:function of a model, larger for better", str),
    Option("min_score", "score that the smaller model must have", float),
    Option("max_drop", "score that the smaller model may lose", float),
    Option("classes", "those that the smaller model is for, 3,7,12", plain, _numbers),
    Option("keep_head", "true: keep the outputs of all classes"),
    Option("importance", "module:Class, such as "
                 "torch_pruning.importance:GroupMagnitudeImportance", str, _object),
    Option("metric", "contribution metric: taylor, avg, var, ens, deeplift", str, _object),
    Option("strategy", "semantic, category, global, divergence or module:Class", str,
                 _object),
    Option("categories", "labels, predicted, null or module:function"),
    Option("features", "pixel, pooled or flat", str),
    Option("ranking", "magnitude or signed", str),
    Option("loss", "module:function of (outputs, labels)", str),
    Option("outputs", "what the outputs mean: classes, labels, values or module:function"),
    Option("fold", "true, false or refit"),
    Option("recalibrate", "true or false: move the statistics of BatchNorms "
           "(by default for 0.7 of the MACs or less with 500 pictures)"),
    Option("balance", "true: keep each class's mean probability"),
    Option("repairs", "module:Class of repairs of your own", plain, _objects),
    Option("profile", "file that nss-prune profile wrote", str, _profile),
    Option("timeout", "seconds of CPU time that tracing the model may take", float),
    Option("memory_limit", "bytes for the sums of a pass", float),
    Option("forward_dtype", "bfloat16 or float16, for passes over the data", str,
           dtype_of("forward_dtype", "bfloat16", "float16", "float32")),
    Option("checkpoint", "folder from which a run that was broken off goes on", str),
    Option("adapters", "module:Class of structures of your own", plain, _objects),
    Option("global_pruning", "true: one ranking for all layers"),
    Option("pruning_ratio_dict", "{layer: ratio}", plain, _by_layer),
    Option("max_pruning_ratio", "share that a layer may lose at most", float),
    Option("iterative_steps", "number of steps, each measured anew", int),
    Option("iterative_pruning_ratio_scheduler", "module:function", str),
    Option("ignored_layers", "names of layers to leave alone, a,b,c", plain, _layers),
    Option("round_to", "keep neurons in multiples of this, or auto"),
    Option("isomorphic", "true: one ranking for layers of one structure"),
    Option("in_channel_groups", "{layer: groups}", plain, _by_layer),
    Option("out_channel_groups", "{layer: groups}", plain, _by_layer),
    Option("num_heads", "{layer: heads}", plain, _by_layer),
    Option("prune_num_heads", "true: remove whole heads of attention"),
    Option("prune_head_dims", "true: remove channels inside of heads"),
    Option("head_pruning_ratio", "share of the heads to remove", float),
    Option("head_pruning_ratio_dict", "{layer: ratio}", plain, _by_layer),
    Option("customized_pruners", "{layer: module:Class}", plain, _pruners),
    Option("unwrapped_parameters", "{parameter: axis}", plain, _by_parameter),
    Option("root_module_types", "module:Class of layers to prune", plain, _layers),
    Option("forward_fn", "module:function of (model, inputs)", str),
    Option("output_transform", "module:function of the outputs", str),
)  # fmt: skip
"""All arguments of NSSPruner and of torch-pruning's pruners that a command line can give."""


def add_named_options(
    parser: argparse.ArgumentParser, options: Sequence[Option], title: str
) -> None:
    """``--theta``, ``--macs-budget`` and so on; values are written as in YAML."""
    group = parser.add_argument_group(title)
    for option in options:
        flag = f"--{option.name.replace('_', '-')}"
        group.add_argument(flag, type=option.kind, help=option.help, metavar="VALUE")


def named_arguments(
    given: argparse.Namespace, options: Sequence[Option], model: nn.Module
) -> dict[str, Any]:
    """Keywords of the function, of the options that were given.

    Raises:
        ArgumentError, ModelMismatchError: One names what there is not.
    """
    return {
        option.name: option.resolved(value, model)
        for option in options
        if (value := getattr(given, option.name, None)) is not None
    }


def add_pruner_options(parser: argparse.ArgumentParser) -> None:
    """Those of :data:`PRUNER_OPTIONS`."""
    add_named_options(parser, PRUNER_OPTIONS, "options of NSSPruner")


def pruner_arguments(options: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Keywords of NSSPruner, see :func:`named_arguments`."""
    return named_arguments(options, PRUNER_OPTIONS, model)


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


def model_source(options: argparse.Namespace, whole: str | None = None) -> ModelSource:
    """Where the model comes from.

    Args:
        whole: Another model, which the weights then are of.

    Raises:
        ArgumentError: None is named.
    """
    if not options.model:
        raise ArgumentError(
            "no model is given; name one of timm or torchvision, module:function, or a pruned file"
        )
    if whole:
        return ModelSource(
            options.model, num_classes=options.num_classes, structure=options.structure
        )
    return replace(whole_source(options, options.model), structure=options.structure)


def whole_source(options: argparse.Namespace, name: str) -> ModelSource:
    """Where the model that the weights are of comes from."""
    return ModelSource(
        name,
        options.weights,
        options.weights_by_order,
        options.pretrained,
        options.num_classes,
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
