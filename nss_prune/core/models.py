"""Call a model, copy it, and set its modes for a while."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.afterwards import afterwards
from nss_prune.core.nested import tensors_in
from nss_prune.errors import DataError, ModelMismatchError, NSSPruneError

Forward = Callable[[nn.Module, Any], Any]
"""Function of (model, inputs) that gives the outputs."""


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` as a batch asks for: a tensor, a sequence of arguments, or keywords."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile wrapped, or the model itself.

    A compiled model runs what it was compiled to, past hooks that came later.
    """
    while isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def in_dtype(forward: Forward, dtype: torch.dtype | None) -> Forward:
    """``forward``, in mixed precision where there is a dtype; weights stay as they are."""
    if dtype is None:
        return forward

    def lower(model: nn.Module, inputs: Any) -> Any:
        with torch.autocast(device_of(model).type, dtype=dtype):
            return forward(model, inputs)

    return lower


def clone(module: nn.Module, copied: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy with children of its own, without hooks, and with ``copied`` of every tensor.

    What is shared inside stays shared, and what refers to modules or tensors of the original, such
    as a ``forward`` replaced on the instance, refers to those of the copy. Not a deep copy: that
    fails on attributes that hold a part of an autograd graph.
    """
    known: dict[int, Any] = {}
    made: nn.Module = _clone(module, copied, known)
    for part in made.modules():
        own = vars(part)
        for name in [name for name in own if name not in _REGISTRIES]:
            if type(own[name]) not in _PLAIN:
                own[name] = _rebound(own[name], known)
    return made


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model without values: it takes no memory, and calling it computes nothing."""
    return clone(model, without_values)


def without_values(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type on torch's "meta" device."""
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _clone(module: nn.Module, copied: Callable[[Tensor], Tensor], known: dict[int, Any]) -> Any:
    if id(module) in known:
        return known[id(module)]
    made = known[id(module)] = copy.copy(module)
    own = vars(made)
    own.update({name: value.copy() for name, value in own.items() if isinstance(value, dict)})
    for name in [name for name in own if name.endswith("_hooks")]:
        own[name] = type(own[name])()
    for held in (made._parameters, made._buffers):
        tensors: dict[str, Any] = {name: value for name, value in held.items() if value is not None}
        for value in tensors.values():
            if id(value) not in known:
                known[id(value)] = _like(value, copied(value))
        held.update((name, known[id(value)]) for name, value in tensors.items())
    children = made._modules.items()
    own["_modules"] = {
        name: None if child is None else _clone(child, copied, known) for name, child in children
    }
    return made


# What every module has, and refers to no module or tensor but its own.
_REGISTRIES = frozenset(vars(nn.Module())) - {"_non_persistent_buffers_set"}
_PLAIN = (bool, int, float, str, type(None))


def _rebound(value: Any, known: Mapping[int, Any]) -> Any:
    """A copy of an attribute that refers to what was cloned instead of the originals.

    Args:
        known: Id of a module or tensor of the original -> its clone.
    """
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, types.MethodType) and id(value.__self__) in known:
        return types.MethodType(value.__func__, known[id(value.__self__)])
    if type(value) is functools.partial:
        function, arguments, keywords = (
            _rebound(part, known) for part in (value.func, value.args, value.keywords)
        )
        return functools.partial(function, *arguments, **keywords)
    if type(value) in (list, tuple, set):
        return type(value)(_rebound(item, known) for item in value)
    if type(value) is dict:
        return {key: _rebound(item, known) for key, item in value.items()}
    return value


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


@contextlib.contextmanager
def flags_kept(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Put training modes and requires_grad flags back as they were, whatever the body does.

    The parameters are what it gives: to walk through a deep model takes as long as a layer.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    gradients = [
        (parameter, parameter.requires_grad)
        for module in modules
        for parameter in module._parameters.values()
        if parameter is not None
    ]

    def put_back() -> None:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)

    with afterwards(put_back):
        yield [parameter for parameter, _ in gradients]


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with frozen parameters inside, everything as it was outside."""
    with flags_kept(model) as parameters:
        model.eval()
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within the context, a GPU does not round the factors of float32 products to TF32.

    Where torch's newer interface (``fp32_precision``) was used, what it says holds.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            products = torch.get_float32_matmul_precision()
            stack.callback(torch.set_float32_matmul_precision, products)
            torch.set_float32_matmul_precision("highest")
            convolutions = torch.backends.cudnn.allow_tf32
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", convolutions)
            torch.backends.cudnn.allow_tf32 = False
        yield


def submodule(model: nn.Module, name: str) -> nn.Module:
    """``model.get_submodule(name)``.

    Raises:
        ModelMismatchError: The model does not have it.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ModelMismatchError(
            f"the model has no layer {name!r}; use the model (or a copy of the same structure) "
            "that was profiled"
        ) from error


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode inside; statistics, modes and random numbers as they were outside."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def put_back() -> None:
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)

    with afterwards(put_back), flags_kept(model), torch.random.fork_rng():
        model.train()
        yield


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU where there is none."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def on_one_device(model: nn.Module) -> bool:
    """Whether all parameters and buffers are on one device."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return len({tensor.device for tensor in tensors}) <= 1


def run(model: nn.Module, inputs: Any, number: int, forward: Forward = call_model) -> Any:
    """The model's outputs.

    Args:
        number: Of the batch, for messages.
        forward: Calls the model on the inputs of a batch.

    Raises:
        DataError: The model refuses the inputs.
    """
    try:
        with _recurrent_gradients(model):
            return forward(model, inputs)
    except NSSPruneError:
        raise
    except Exception as error:
        shapes = [tuple(tensor.shape) for tensor in tensors_in(inputs)]
        raise DataError(
            f"the model refuses batch {number} with inputs of shape {shapes}: {error}; give data "
            "of the shape that the model takes"
        ) from error


def _recurrent_gradients(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context in which gradients of recurrent layers exist in evaluation mode: not by cuDNN."""
    recurrent = torch.is_grad_enabled() and any(isinstance(m, nn.RNNBase) for m in model.modules())
    if not recurrent or not torch.backends.cudnn.enabled:
        return contextlib.nullcontext()
    flags: contextlib.AbstractContextManager[Any] = torch.backends.cudnn.flags(enabled=False)
    return flags
