"""What the file of a pruned model holds: its tensors, their ties, and the modules' numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nss_prune.core.schema import (
    LARGEST,
    anything,
    array,
    check_tensors,
    either,
    names,
    number,
    one_of,
    record,
    refuse,
    table,
    text,
    whole,
)
from nss_prune.errors import ArgumentError, FileFormatError

KIND = "nss_prune model"
REMEDY = "pass model=, a fresh, unpruned model, made by the same code as the one that was saved"


def _floating(value: Any, where: str) -> None:
    dtype = getattr(torch, value.removeprefix("torch."), None) if type(value) is str else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise refuse(where, value, "the name of a floating-point dtype")


def _recipe(value: Any, where: str) -> None:
    """Arguments of timm.create_model; those beside the name count where a model is built."""
    table(anything)(value, where)
    text(value.get("model_name"), f"{where}.model_name")


_INTEGER = whole(-LARGEST, LARGEST)
NOTES = record(
    {
        "modules": table(
            record({"class": text, "numbers": table(either(_INTEGER, number(), array(_INTEGER)))})
        ),
        "ties": table(names),
        "unsaved": table(_floating),
        "timm": either(one_of(None), _recipe),
    }
)
"""Of the notes of a file."""


def check_contents(stored: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Raise FileFormatError unless the tensors are those that the notes speak of.

    Args:
        notes: What :data:`NOTES` allows.
    """
    ties: Mapping[str, list[str]] = notes["ties"]
    check_tensors(stored, ties)
    known = [name for each in ties.values() for name in each]
    wrong = [first for first, each in ties.items() if first not in each]
    if wrong or len(set(known)) < len(known):
        raise FileFormatError(f"the ties of {some(wrong or known)} are not those of tensors")
    for kind, found in (("tensors", known), ("unsaved", notes["unsaved"])):
        homeless = [name for name in found if name.rpartition(".")[0] not in notes["modules"]]
        if homeless:
            raise FileFormatError(f"there are {kind} of no module: {some(homeless)}")


def named_tensors(model: nn.Module, *, values: bool = True) -> dict[str, Tensor]:
    """Parameters and persistent buffers under all of their names.

    Args:
        values: Refuse those without values.

    Raises:
        ArgumentError: One is no plain tensor, with values.
    """
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and key not in module._non_persistent_buffers_set:
                found[join(name, key)] = tensor
    for name, tensor in found.items():
        if not _is_plain(tensor) or (values and tensor.is_meta):
            raise ArgumentError(
                f"{name} is a {type(tensor).__name__} without plain values (lazy, on the meta "
                "device, sparse, or of a tensor subclass); make it an ordinary tensor first"
            )
    return found


def _is_plain(tensor: Tensor) -> bool:
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return False
    return type(tensor.detach()) is Tensor


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers outside the state dict: the model makes them itself."""
    return {
        join(name, key): buffer
        for name, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if key in module._non_persistent_buffers_set
        if buffer is not None and buffer.is_floating_point()
    }


def ties_of(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """First name of each tensor -> all of its names."""
    firsts: dict[int, str] = {}
    ties: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        first = firsts.setdefault(id(tensor), name)
        ties.setdefault(first, []).append(name)
    return ties


def numbers_of(module: nn.Module) -> dict[str, Any]:
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


def impossible(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Parameters with NaN, and variances of norms that are negative or NaN.

    Other buffers may hold what they like, such as the infinities of a mask.

    Args:
        tensors: Name -> values, of the model itself or for it.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            value = tensors.get(join(name, key))
            if parameter is not None and value is not None and bool(value.isnan().any()):
                yield join(name, key)
        variance = tensors.get(join(name, "running_var"))
        if variance is None or not isinstance(module, nn.modules.batchnorm._NormBase):
            continue
        if not bool((variance >= 0).all()):
            yield join(name, "running_var")


def join(module: str, key: str) -> str:
    """The qualified name of a tensor."""
    return f"{module}.{key}" if module else key


def some(found: Iterable[str], most: int = 4) -> str:
    """The first of some names in an error."""
    ordered = sorted(found)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(map(repr, ordered[:most])) or "none") + more
