"""Pruned models in files: every tensor, and the structure that the pruning left."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nss_prune.core.files import read_file, write_file
from nss_prune.core.models import submodule
from nss_prune.core.multihead import HeadwiseAttention
from nss_prune.errors import ArgumentError, ModelMismatchError
from nss_prune.graph.tracing import refuse_reparametrised
from nss_prune.pruner.classes import KEPT_CLASSES

KIND = "nss_prune model"
_REMEDY = "pass model=, a fresh, unpruned model, made by the same code as the one that was saved"


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
        OSError: The file cannot be written.
    """
    _refuse_masks(model)
    refuse_reparametrised(model)
    tensors = _named_tensors(model)
    _refuse_other_state(model, tensors)
    ties = _ties(tensors)
    notes = {
        "modules": {
            name: {"class": type(module).__name__, "numbers": _numbers(module)}
            for name, module in model.named_modules(remove_duplicate=False)
        },
        "ties": ties,
        "unsaved": {name: str(value.dtype) for name, value in _unsaved_buffers(model).items()},
        "timm": _timm_recipe(model),
    }
    write_file(path, KIND, {name: tensors[name] for name in ties}, notes)


def load_pruned(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Turn an unpruned model into the pruned one of a file.

    Tensors take the shapes and dtypes of the file and stay on the model's devices. Those that
    change are new objects, so build optimisers afterwards. Training modes and requires_grad flags
    stay as they are.

    Args:
        path: A file that :func:`save_pruned` wrote.
        model: A fresh model of the structure that was pruned, changed in place. By default the
            timm architecture that the file names is built, in evaluation mode.

    Returns:
        ``model``, whose outputs are those of the saved one, bit for bit.

    Raises:
        FileFormatError: The file is damaged, foreign, or of a newer version.
        ModelMismatchError: The model has other modules or tensors, or smaller ones.
        ArgumentError: No model is given and the file names no timm architecture, or the model
            has tensors without values.
        OSError: The file cannot be read.
        In each case the model is as it was.
    """
    stored, notes = read_file(path, KIND)
    if model is None:
        model = _build(path, notes["timm"])
    _check_modules(model, notes["modules"])
    present = _named_tensors(model)
    saved = {name: stored[first] for first, names in notes["ties"].items() for name in names}
    added = {
        name: _new_bias(model, name, saved.pop(name))
        for name in sorted(saved.keys() - present.keys())
        if _lacks_bias(model, name)
    }
    _check_tensors(present, saved)
    ties = {first: names for first, names in notes["ties"].items() if first not in added}
    new = {**_new_tensors(present, stored, ties), **added}
    with torch.no_grad():
        for name in saved.keys() - new.keys():
            present[name].copy_(saved[name])
    for name, tensor in new.items():
        _put(model, name, tensor)
    for name, dtype in notes["unsaved"].items():
        _cast_buffer(model, name, getattr(torch, dtype.removeprefix("torch.")))
    for name, module in model.named_modules(remove_duplicate=False):
        _become(module, notes["modules"][name]["class"])
        _set_numbers(module, notes["modules"][name]["numbers"])
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


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under all of their names.

    Raises:
        ArgumentError: One is no plain tensor with values.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                found[_join(name, key)] = tensor
    for name, tensor in found.items():
        if not _is_plain(tensor):
            raise ArgumentError(
                f"{name} is a {type(tensor).__name__} without plain values (lazy, on the meta "
                "device, sparse, or of a tensor subclass); make it an ordinary tensor first"
            )
    return found


def _is_plain(tensor: Tensor) -> bool:
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    return type(tensor.detach()) is Tensor


def _refuse_other_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise if a state dict has more or less than the parameters and buffers."""
    differing = model.state_dict().keys() ^ tensors.keys()
    if differing:
        raise ArgumentError(
            f"the state dict of {type(model).__name__} differs from its parameters and buffers "
            f"in {_some(differing)}; only these can be saved: keep extra state in buffers, and "
            "take off hooks that rename the state"
        )


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers outside the state dict: the model makes them itself."""
    return {
        _join(name, key): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if key in module._non_persistent_buffers_set
        if buffer is not None and buffer.is_floating_point()
    }


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """First name of each tensor -> all of its names."""
    firsts: dict[int, str] = {}
    ties: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        first = firsts.setdefault(id(tensor), name)
        ties.setdefault(first, []).append(name)
    return ties


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Public attributes that are an int, a float or a tuple of ints."""
    return {
        key: tuple(value) if isinstance(value, tuple) else value
        for key, value in vars(module).items()
        if not key.startswith("_") and _is_number(value)
    }


def _is_number(value: Any) -> bool:
    if type(value) in (tuple, torch.Size):
        return all(type(item) is int for item in value)
    return type(value) in (int, float)


def _set_numbers(module: nn.Module, saved: Mapping[str, Any]) -> None:
    present = _numbers(module)
    for key, value in saved.items():
        value = tuple(value) if isinstance(value, list) else value
        if key == KEPT_CLASSES or (key in present and type(present[key]) is type(value)):
            vars(module)[key] = value


def _timm_recipe(model: nn.Module) -> dict[str, Any] | None:
    """Arguments of ``timm.create_model`` for a model of the same structure, unpruned."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, Mapping) or not config.get("architecture"):
        return None
    recipe: dict[str, Any] = {"model_name": config["architecture"]}
    if isinstance(getattr(model, "num_classes", None), int):
        recipe["num_classes"] = model.num_classes
    if isinstance(getattr(model, "global_pool", None), str):
        recipe["global_pool"] = model.global_pool
    channels = _input_channels(model, config.get("first_conv"))
    if channels is not None:
        recipe["in_chans"] = channels
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple) and size != tuple(config.get("input_size", ())[1:]):
        recipe["img_size"] = size
    return recipe


def _input_channels(model: nn.Module, first: Any) -> int | None:
    """What the first convolution reads; its name, or the first of several, is in timm's config."""
    name = first[0] if isinstance(first, (tuple, list)) and first else first
    convolution = dict(model.named_modules()).get(name)
    if isinstance(convolution, (nn.modules.conv._ConvNd, nn.Linear)):
        return int(convolution.weight.shape[1])
    return None


def _build(path: str | os.PathLike[str], recipe: dict[str, Any] | None) -> nn.Module:
    if recipe is None:
        raise ArgumentError(
            f"{os.fspath(path)!r} names no timm architecture that could be built; {_REMEDY}"
        )
    import timm  # here, because it takes seconds that few need

    try:
        model: nn.Module = timm.create_model(**recipe)
    except Exception as error:
        raise ModelMismatchError(
            f"timm could not build the architecture of {os.fspath(path)!r} ({recipe}): {error}; "
            f"{_REMEDY}"
        ) from error
    return model.eval()


def _check_modules(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    present = {
        name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)
    }
    _check_names("modules", present, saved)
    for name, facts in saved.items():
        if present[name] != facts["class"] and not _can_become(present[name], facts["class"]):
            raise ModelMismatchError(
                f"module {name!r} is a {present[name]}, in the file a {facts['class']}; {_REMEDY}"
            )


def _can_become(present: str, saved: str) -> bool:
    """Whether pruning makes a module of one class one of another, by their names."""
    return (present, saved) == (nn.MultiheadAttention.__name__, HeadwiseAttention.__name__)


def _become(module: nn.Module, saved: str) -> None:
    """Let torch's attention be what it becomes where it loses heads."""
    if saved == HeadwiseAttention.__name__ and isinstance(module, nn.MultiheadAttention):
        module.__class__ = HeadwiseAttention
        module._qkv_same_embed_dim = False


def _check_tensors(present: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    _check_names("tensors", present, saved)
    for name, value in saved.items():
        here, there = tuple(present[name].shape), tuple(value.shape)
        larger = any(size > most for size, most in zip(there, here, strict=False))
        if len(here) != len(there) or larger:
            raise ModelMismatchError(
                f"{name} has shape {there} in the file, {here} in the model, and pruning only "
                f"makes tensors smaller; {_REMEDY}"
            )
        if present[name].is_floating_point() != value.is_floating_point():
            raise ModelMismatchError(
                f"{name} is {value.dtype} in the file, {present[name].dtype} in the model; "
                f"{_REMEDY}"
            )


def _check_names(kind: str, present: Iterable[str], saved: Iterable[str]) -> None:
    missing, extra = set(saved) - set(present), set(present) - set(saved)
    if missing or extra:
        raise ModelMismatchError(
            f"the model lacks {_some(missing)} of the file's {kind} and has {_some(extra)} that "
            f"the file lacks; {_REMEDY}"
        )


def _new_tensors(
    present: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    ties: Mapping[str, list[str]],
) -> dict[str, Tensor]:
    """Name -> tensor to put there, for those that the model's own cannot become."""
    present_ties = _ties(present)
    new: dict[str, Tensor] = {}
    for first, names in ties.items():
        old, value = present[first], stored[first]
        if present_ties.get(first) == names and _can_hold(old, value):
            continue
        # A copy, because what safetensors reads may be the mapped file itself.
        tensor = value.to(old.device, copy=True)
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, old.requires_grad)
        new.update(dict.fromkeys(names, tensor))
    return new


def _lacks_bias(model: nn.Module, name: str) -> bool:
    """Whether this is a bias for a layer that has none: folding makes one there."""
    layer, _, key = name.rpartition(".")
    parameters = submodule(model, layer)._parameters
    return key == "bias" and parameters.get("bias", 0) is None and "weight" in parameters


def _new_bias(model: nn.Module, name: str, value: Tensor) -> nn.Parameter:
    weight: Any = submodule(model, name.rpartition(".")[0]).weight
    return nn.Parameter(value.to(weight.device, copy=True), weight.requires_grad)


def _can_hold(old: Tensor, value: Tensor) -> bool:
    # An expanded tensor, with strides of zero, has not a place for each of its entries.
    return old.shape == value.shape and old.dtype == value.dtype and 0 not in old.stride()


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, key = name.rpartition(".")
    setattr(submodule(model, parent), key, tensor)


def _cast_buffer(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    parent, _, key = name.rpartition(".")
    buffer = submodule(model, parent)._buffers.get(key)
    if buffer is not None and buffer.is_floating_point():
        submodule(model, parent)._buffers[key] = buffer.to(dtype)


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _some(names: Iterable[str], most: int = 4) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(map(repr, ordered[:most])) or "none") + more
