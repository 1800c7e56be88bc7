"""Give a model the tensors and numbers of a file of a pruned one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import submodule
from nss_prune.core.multihead import HeadwiseAttention
from nss_prune.errors import FileFormatError, ModelMismatchError
from nss_prune.pruner.classes import KEPT_CLASSES
from nss_prune.pruner.contents import (
    REMEDY,
    impossible,
    join,
    named_tensors,
    numbers_of,
    some,
    ties_of,
)

_Convolution, _Norm = nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase


@dataclass(frozen=True)
class Loading:
    """What a file has to give, checked for itself.

    Attributes:
        path: Of the file, for messages.
        stored: First name of each tensor -> the tensor.
        notes: See :data:`nss_prune.pruner.contents.NOTES`.
    """

    path: str | os.PathLike[str]
    stored: Mapping[str, Tensor]
    notes: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def check(self, model: nn.Module, present: Mapping[str, Tensor]) -> None:
        """Whether a model can take the tensors; its parameters need no values.

        Raises:
            ModelMismatchError: It has other modules or tensors, or smaller ones.
            FileFormatError: The numbers of a layer contradict its weight.
        """
        _check_modules(model, self.notes["modules"])
        saved = self._by_name()
        added = [name for name in saved.keys() - present.keys() if _lacks_bias(model, name)]
        _check_tensors(present, {n: value for n, value in saved.items() if n not in added})
        for name in added:
            _check_bias(model, name, saved)
        if wrong := sorted(impossible(model, saved)):
            raise FileFormatError(
                f"{os.fspath(self.path)!r} has NaN or negative variances in {some(wrong)}; save a "
                "model without them"
            )
        for name, module in model.named_modules(remove_duplicate=False):
            _check_length(name, module, saved)
            _check_numbers(self.path, name, module, self.notes["modules"][name]["numbers"], saved)

    def fill(self, model: nn.Module) -> None:
        """Do it; the model passed :meth:`check`."""
        present, saved = named_tensors(model, values=False), self._by_name()
        added = {
            name: _new_bias(model, name, saved.pop(name))
            for name in sorted(saved.keys() - present.keys())
        }
        ties = {f: names for f, names in self.notes["ties"].items() if f not in added}
        new = {**_new_tensors(present, self.stored, ties), **added}
        with torch.no_grad():
            for name in saved.keys() - new.keys():
                present[name].copy_(saved[name])
        for name, tensor in new.items():
            _put(model, name, tensor)
        for name, dtype in self.notes["unsaved"].items():
            _cast_buffer(model, name, getattr(torch, dtype.removeprefix("torch.")))
        for name, module in model.named_modules(remove_duplicate=False):
            _become(module, self.notes["modules"][name]["class"])
            _set_numbers(module, self.notes["modules"][name]["numbers"])

    def _by_name(self) -> dict[str, Tensor]:
        ties = self.notes["ties"].items()
        return {name: self.stored[first] for first, names in ties for name in names}


def _check_modules(model: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    present = {
        name: type(module).__name__ for name, module in model.named_modules(remove_duplicate=False)
    }
    _check_names("modules", present, saved)
    for name, facts in saved.items():
        if present[name] != facts["class"] and not _can_become(present[name], facts["class"]):
            raise ModelMismatchError(
                f"module {name!r} is a {present[name]}, in the file a {facts['class']}; {REMEDY}"
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
                f"makes tensors smaller; {REMEDY}"
            )
        if present[name].is_floating_point() != value.is_floating_point():
            raise ModelMismatchError(
                f"{name} is {value.dtype} in the file, {present[name].dtype} in the model; {REMEDY}"
            )


def _check_names(kind: str, present: Iterable[str], saved: Iterable[str]) -> None:
    missing, extra = set(saved) - set(present), set(present) - set(saved)
    if missing or extra:
        raise ModelMismatchError(
            f"the model lacks {some(missing)} of the file's {kind} and has {some(extra)} that "
            f"the file lacks; {REMEDY}"
        )


def _check_bias(model: nn.Module, name: str, saved: Mapping[str, Tensor]) -> None:
    """A bias that the model does not have is as long as the weight beside it is wide."""
    layer = name.rpartition(".")[0]
    weight, bias = saved[join(layer, "weight")], saved[name]
    module = submodule(model, layer)
    axis = 1 if getattr(module, "transposed", False) else 0
    width = weight.shape[axis] * (getattr(module, "groups", 1) if axis else 1)
    if bias.dim() != 1 or len(bias) != width or not bias.is_floating_point():
        raise ModelMismatchError(
            f"{name} has shape {tuple(bias.shape)} in the file, the layer {width} outputs; {REMEDY}"
        )


def _check_length(name: str, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """What a layer of torch has for each of its channels is as long as its weight is wide."""
    weight = saved.get(join(name, "weight"))
    if weight is None or not isinstance(module, (nn.Linear, _Convolution, _Norm)):
        return
    transposed = isinstance(module, _Convolution) and module.transposed
    for key in ("bias", "running_mean", "running_var"):
        value = saved.get(join(name, key))
        if value is not None and not transposed and len(value) != len(weight):
            raise FileFormatError(
                f"{join(name, key)} has {len(value)} entries for {len(weight)} channels; save "
                "the model again"
            )


def _check_numbers(
    path: str | os.PathLike[str],
    name: str,
    module: nn.Module,
    numbers: Mapping[str, Any],
    saved: Mapping[str, Tensor],
) -> None:
    """The widths that a layer of torch takes from the file are those of the weight there."""
    weight, present = saved.get(join(name, "weight")), numbers_of(module)
    for key in ("start_dim", "end_dim") if isinstance(module, nn.Flatten) else ():
        if numbers.get(key) != present[key]:
            raise FileFormatError(
                f"{os.fspath(path)!r} gives {name!r} {key} = {numbers.get(key)}, the model "
                f"{present[key]}, which no pruning changes; save the model again"
            )
    if weight is None:
        return
    for key, width in _widths(module, weight, numbers).items():
        value = numbers.get(key, None if key in present else width)
        value = tuple(value) if isinstance(value, list) else value
        if value not in (width, present.get(key)):
            raise FileFormatError(
                f"{os.fspath(path)!r} gives {name!r} {key} = {value} and a weight for {width}; "
                "save the model again"
            )


def _widths(module: nn.Module, weight: Tensor, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Attribute -> what it must be for a weight of some layers of torch."""
    shape = tuple(weight.shape)
    if isinstance(module, nn.Linear) and len(shape) == 2:
        return {"out_features": shape[0], "in_features": shape[1]}
    if isinstance(module, _Convolution) and len(shape) > 2:
        groups = numbers.get("groups", module.groups)
        grouped, plain = ("out", "in") if module.transposed else ("in", "out")
        return {
            f"{plain}_channels": shape[0],
            f"{grouped}_channels": shape[1] * groups,
            "kernel_size": shape[2:],
        }
    if isinstance(module, _Norm) and len(shape) == 1:
        return {"num_features": shape[0]}
    return {"normalized_shape": shape} if isinstance(module, nn.LayerNorm) else {}


def _new_tensors(
    present: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    ties: Mapping[str, list[str]],
) -> dict[str, Tensor]:
    """Name -> tensor to put there, for those that the model's own cannot become."""
    present_ties = ties_of(present)
    new: dict[str, Tensor] = {}
    for first, names in ties.items():
        old, value = present[first], stored[first]
        if present_ties.get(first) == names and _can_hold(old, value):
            continue
        # A copy, because what safetensors reads may be the mapped file itself.
        tensor = value.to(_home(old), copy=True)
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
    return nn.Parameter(value.to(_home(weight), copy=True), weight.requires_grad)


def _can_hold(old: Tensor, value: Tensor) -> bool:
    # An expanded tensor, with strides of zero, has not a place for each of its entries.
    return (
        not old.is_meta
        and old.shape == value.shape
        and old.dtype == value.dtype
        and 0 not in old.stride()
    )


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, key = name.rpartition(".")
    setattr(submodule(model, parent), key, tensor)


def _cast_buffer(model: nn.Module, name: str, dtype: torch.dtype) -> None:
    parent, _, key = name.rpartition(".")
    buffer = submodule(model, parent)._buffers.get(key)
    if buffer is not None and buffer.is_floating_point():
        submodule(model, parent)._buffers[key] = buffer.to(dtype)


def _set_numbers(module: nn.Module, saved: Mapping[str, Any]) -> None:
    present = numbers_of(module)
    for key, value in saved.items():
        value = tuple(value) if isinstance(value, list) else value
        if key == KEPT_CLASSES or (key in present and type(present[key]) is type(value)):
            vars(module)[key] = value


def _home(tensor: Tensor) -> torch.device:
    """Where a model that is built without values will be: torch's default device."""
    return torch.get_default_device() if tensor.is_meta else tensor.device
