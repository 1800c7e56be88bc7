"""The architecture of timm that a file names, built without more memory than the file pays for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nss_prune.core.nested import tensors_in
from nss_prune.core.schema import Check, either, record, row, text, whole
from nss_prune.errors import ArgumentError, FileFormatError, ModelMismatchError
from nss_prune.pruner.contents import REMEDY, named_tensors
from nss_prune.pruner.loading import Loading

_SIDE = whole(1, 1024)  # pixels
_ARGUMENTS: dict[str, Check] = {
    "num_classes": whole(0, 2**24),
    "global_pool": text,
    "in_chans": whole(1, 2**16),
    "img_size": either(_SIDE, row(_SIDE, _SIDE)),
}
_FREE, _PER_BYTE = 2**28, 64  # bytes that a model may take, and further ones for each of the file
_TRUST = "pass model=, or trust=True if you made the file yourself"


def timm_recipe(model: nn.Module) -> dict[str, Any] | None:
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


def built(
    path: str | os.PathLike[str], recipe: dict[str, Any] | None, loading: Loading, *, trust: bool
) -> nn.Module:
    """The model of a recipe, with the tensors of the file.

    It is built with parameters that have no values, which become those of the file then. A model
    that needs values when it is built, or fills a table of its own in place, is built with them.

    Raises:
        ArgumentError: There is no recipe.
        FileFormatError: It has other arguments than :func:`timm_recipe` gives, or the model is
            far larger than the file, without ``trust``.
        ModelMismatchError: timm cannot build it, or the file has tensors for another model.
    """
    if recipe is None:
        raise ArgumentError(
            f"{os.fspath(path)!r} names no timm architecture that could be built; {REMEDY}"
        )
    if not trust:
        _check_recipe(path, recipe)
    import timm  # here, because it takes seconds that few need

    limit = float("inf") if trust else _FREE + _PER_BYTE * loading.size
    for values in (False, True):
        try:
            with _Frugal(path, limit, values):
                model: nn.Module = timm.create_model(**{"pretrained": False, **recipe})
        except FileFormatError:
            raise
        except Exception as error:
            if not values:
                continue
            raise ModelMismatchError(
                f"timm could not build the architecture of {os.fspath(path)!r} ({recipe}): "
                f"{error}; {REMEDY}"
            ) from error
        loading.check(model, named_tensors(model, values=False))
        loading.fill(model)
        if not _lacks_values(model):
            break
    return model


def _check_recipe(path: str | os.PathLike[str], recipe: Mapping[str, Any]) -> None:
    import timm

    try:
        record({"model_name": text}, _ARGUMENTS)(recipe, "")
    except FileFormatError as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} gives timm.create_model other arguments than save_pruned writes "
            f"({error}), with which it might read files or ask the network; {_TRUST}"
        ) from error
    name = recipe["model_name"]
    if ":" in name or "/" in name or not timm.is_model(name):
        raise ModelMismatchError(
            f"{os.fspath(path)!r} names the architecture {name[:80]!r}, which timm does not have; "
            f"{REMEDY}"
        )


def _lacks_values(model: nn.Module) -> bool:
    """Whether a buffer, or a tensor that is an attribute, was made without values."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    attributes = (vars(module).values() for module in model.modules())
    others = (tensor for values in attributes for tensor in tensors_in(list(values)))
    return any(tensor.is_meta for tensor in itertools.chain(tensors, others))


class _Frugal(TorchFunctionMode):
    """Within the context all tensors together take only so much memory.

    Args:
        path: Of the file, for messages.
        limit: Bytes.
        values: Whether ``torch.empty``, which makes parameters, takes any.

    Raises:
        FileFormatError: More than ``limit`` is needed, before it is taken.
    """

    def __init__(self, path: str | os.PathLike[str], limit: float, values: bool) -> None:
        super().__init__()
        self._path, self._left, self._values = path, limit, values

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            planned = function(*args, **{**kwargs, "device": "meta"})
            if not self._values:
                return planned
            self._refuse(planned.nbytes)
        self._refuse(_broadcast_bytes(args))
        made = function(*args, **kwargs)
        if isinstance(made, Tensor) and not made.is_meta and made._base is None:
            self._left -= made.nbytes
            self._refuse(0)
        return made

    def _refuse(self, wanted: int) -> None:
        if wanted > self._left:
            raise FileFormatError(
                f"{os.fspath(self._path)!r} names a model that takes far more memory than the "
                f"file; {_TRUST}"
            )


def _broadcast_bytes(arguments: Any) -> int:
    """Bytes of the product of two tensors, before it is made."""
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    if len(tensors) < 2 or any(tensor.is_meta for tensor in tensors):
        return 0
    try:
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    except RuntimeError:  # of a function that does not broadcast
        return 0
    return int(shape.numel() * tensors[0].element_size())
