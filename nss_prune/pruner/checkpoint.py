"""Pruned models in files: every tensor, and the structure that the pruning left."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from nss_prune.core.files import checked_contents, read_file, write_file
from nss_prune.core.models import uncompiled
from nss_prune.core.undo import restored_on_error
from nss_prune.errors import ArgumentError, NumericalError
from nss_prune.graph.tracing import refuse_reparametrised
from nss_prune.pruner.contents import (
    KIND,
    NOTES,
    check_contents,
    impossible,
    named_tensors,
    numbers_of,
    some,
    ties_of,
    unsaved_buffers,
)
from nss_prune.pruner.loading import Loading
from nss_prune.pruner.recipe import built, timm_recipe


def save_pruned(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a pruned model as safetensors: no pickle, whole or not at all.

    The file holds every parameter and persistent buffer (tied ones once) in its dtype, the public
    numbers among the attributes of every module (``out_channels``, ``normalized_shape``,
    ``num_heads``, ...), and for a model of timm what it takes to build it again.

    Args:
        model: The model; it is not changed.
        path: The file, by custom ``*.safetensors``; replaced if it exists.

    Raises:
        ArgumentError: A weight is masked or reparametrised, or the model has state that is not a
            plain tensor.
        NumericalError: A parameter has NaN, or a norm a variance that is negative or NaN.
        OSError: The file cannot be written.
    """
    model = uncompiled(model)
    _refuse_masks(model)
    refuse_reparametrised(model)
    tensors = named_tensors(model)
    _refuse_other_state(model, tensors)
    if wrong := sorted(impossible(model, tensors)):
        raise NumericalError(
            f"the model has NaN or negative variances in {some(wrong)}; save one that was trained "
            "without them"
        )
    ties = ties_of(tensors)
    notes = {
        "modules": {
            name: {"class": type(module).__name__, "numbers": numbers_of(module)}
            for name, module in model.named_modules(remove_duplicate=False)
        },
        "ties": ties,
        "unsaved": {name: str(value.dtype) for name, value in unsaved_buffers(model).items()},
        "timm": timm_recipe(model),
    }
    write_file(path, KIND, {name: tensors[name] for name in ties}, notes)


def load_pruned(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, trust: bool = False
) -> nn.Module:
    """Turn an unpruned model into the pruned one of a file.

    Tensors take the shapes and dtypes of the file and stay on the model's devices. Those that
    change are new objects, so build optimisers afterwards. Training modes and requires_grad flags
    stay as they are.

    Args:
        path: A file that :func:`save_pruned` wrote.
        model: A fresh model of the structure that was pruned, changed in place. By default the
            timm architecture that the file names is built, without pretrained weights and in
            evaluation mode. Its parameters take no more memory than the file.
        trust: Give timm whatever arguments the file names, also those that :func:`save_pruned`
            does not write, with which timm may read files and ask the network; and build models
            that are far larger than the file. Only for files that you made.

    Returns:
        ``model``, whose outputs are those of the saved one, bit for bit.

    Raises:
        FileFormatError: The file is damaged, foreign, of a newer version, or needs ``trust``.
        ModelMismatchError: The model has other modules or tensors, or smaller ones.
        ArgumentError: No model is given and the file names no timm architecture, or the model
            has tensors without values.
        OSError: The file cannot be read.
        In each case the model is as it was.
    """
    stored, notes = read_file(path, KIND, NOTES)
    with checked_contents(path):
        check_contents(stored, notes)
    loading = Loading(path, stored, notes)
    if model is None:
        return built(path, notes["timm"], loading, trust=trust).eval()
    inner = uncompiled(model)
    loading.check(inner, named_tensors(inner))
    with restored_on_error(inner, values=True):
        loading.fill(inner)
    return model


def _refuse_masks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            masked = key.removesuffix("_orig")
            if masked != key and hasattr(module, f"{masked}_mask"):
                raise ArgumentError(
                    f"{masked!r} of layer {name!r} is masked; only plain weights can be saved: "
                    "call nss_prune.unstructured.make_permanent(model) first, or for other masks "
                    f"torch.nn.utils.prune.remove(layer, {masked!r})"
                )


def _refuse_other_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise if a state dict has more or less than the parameters and buffers."""
    differing = model.state_dict().keys() ^ tensors.keys()
    if differing:
        raise ArgumentError(
            f"the state dict of {type(model).__name__} differs from its parameters and buffers "
            f"in {some(differing)}; only these can be saved: keep extra state in buffers, and "
            "take off hooks that rename the state"
        )
