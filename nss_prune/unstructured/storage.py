"""Masks in files: safetensors, one bit a weight."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from nss_prune.core.bits import SHAPES, pack, unpack
from nss_prune.core.files import checked_contents, read_file, write_file
from nss_prune.core.schema import check_tensors, record
from nss_prune.errors import ModelMismatchError, NothingToPruneError
from nss_prune.unstructured.masks import masks_of, set_masks
from nss_prune.unstructured.weights import Layer, readable_layers

_MASKS = "nss_prune masks"


def save_masks(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write the masks of a model, one bit a weight; an existing file is replaced.

    Args:
        path: the file, by custom `*.safetensors`.
        model: a model with masks.

    Raises:
        NothingToPruneError: no layer has a mask.
        OSError: the file cannot be written.
    """
    masks = masks_of(model)
    if not masks:
        raise NothingToPruneError("the model has no masks to save: call sparsify first")
    write_file(path, _MASKS, pack(masks), {"shapes": shapes(masks)})


def load_masks(path: str | os.PathLike[str], model: nn.Module) -> dict[str, Tensor]:
    """Give a model the masks of a file. Layers that the file does not name stay as they are.

    Args:
        path: a file that :func:`save_masks` wrote.
        model: a model with layers of the same names and shapes. Masks that it has on them
            are replaced.

    Returns:
        The masks by qualified name of the layer, as from `sparsify`.

    Raises:
        FileFormatError: the file is damaged, foreign, or of a newer version.
        ModelMismatchError: the model lacks a layer, or a shape differs.
        OSError: the file cannot be read.
        In each case the model is as it was.
    """
    tensors, notes = read_file(path, _MASKS, record({"shapes": SHAPES}))
    with checked_contents(path):
        check_tensors(tensors, notes["shapes"])
        stored = unpack(tensors, notes["shapes"])
    masks = match(stored, readable_layers(model))
    set_masks(model, masks)
    return {layer.name: mask for layer, mask in masks.items()}


def match(masks: Mapping[str, Tensor], layers: list[Layer]) -> dict[Layer, Tensor]:
    """The layers that the masks were made for, with the masks on their devices.

    Raises:
        ModelMismatchError: names the first that does not fit.
    """
    by_name = {layer.name: layer for layer in layers}
    for name, mask in masks.items():
        found = by_name[name].shape if name in by_name else "no such layer"
        if found != tuple(mask.shape):
            raise ModelMismatchError(
                f"the file has a mask of shape {tuple(mask.shape)} for layer {name!r}, the model "
                f"has {found}: load it into the architecture that it was saved from"
            )
    return {by_name[name]: mask.to(by_name[name].weight.device) for name, mask in masks.items()}


def shapes(masks: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """What :func:`unpack` needs to know beside the bits."""
    return {name: list(mask.shape) for name, mask in masks.items()}
