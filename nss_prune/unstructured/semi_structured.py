"""N:M sparsity: of every M weights in a row over the inputs, at most N survive.

A. Mishra et al., "Accelerating sparse deep neural networks", 2021, arXiv 2104.08378.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nss_prune.errors import ArgumentError, NothingToPruneError
from nss_prune.unstructured.magnitudes import Keys
from nss_prune.unstructured.masks import make_permanent, set_masks
from nss_prune.unstructured.weights import (
    IgnoredLayers,
    Layer,
    check_finite,
    prunable_layers,
    readable_layers,
)

_LEAST_CAPABILITY = (8, 0)


def n_m(
    model: nn.Module, n: int = 2, m: int = 4, ignored_layers: IgnoredLayers = ()
) -> dict[str, Tensor]:
    """Keep the n largest surviving weights of every m that follow each other over the inputs.

    Of equal ones the first are kept. Weights that are masked already stay so, hence a group
    can keep fewer than n. The masks are like those of `sparsify`.

    Args:
        model: any module with float weights; changed in place.
        n: how many of a group to keep, from 1 to m - 1.
        m: size of a group along the input axis.
        ignored_layers: modules or qualified names that stay as they are.

    Returns:
        The masks by qualified name of the layer.

    Raises:
        ArgumentError: n or m is out of range, or the inputs of a layer (within one group of
            a grouped convolution) are no multiple of m.
        NothingToPruneError: no layer is left.
        NumericalError: a weight is NaN or infinite.
        In each case the model is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 10))
        >>> masks = n_m(model, ignored_layers=["0"])
        >>> int(masks["1"].sum())
        40
    """
    if not (isinstance(n, int) and isinstance(m, int) and 0 < n < m):
        raise ArgumentError(f"n:m is {n}:{m}: pass whole numbers 0 < n < m, for example 2:4")
    layers = prunable_layers(model, ignored_layers)
    uneven = [layer.name for layer in layers if layer.shape[layer.input_axis] % m]
    if uneven:
        raise ArgumentError(
            f"the inputs of layers {uneven} are no multiple of m = {m}: put these layers in "
            "ignored_layers or choose another m"
        )
    check_finite(layers)
    masks = {layer: _n_m_mask(layer, n, m) for layer in layers}
    set_masks(model, masks)
    return {layer.name: mask for layer, mask in masks.items()}


def to_semi_structured(model: nn.Module) -> tuple[str, ...]:
    """Make the 2:4 masks of Linear layers permanent in the form that sparse tensor cores run.

    Only for inference: the zeros are written into all masked weights of the model, and the
    weights of the 2:4 Linear layers become torch's semi-structured sparse tensors.

    Args:
        model: a model on a CUDA device of compute capability 8.0 or more, in a precision and
            with shapes that `torch.sparse.to_sparse_semi_structured` supports (float16:
            multiples of 64 or so), with 2:4 masks from :func:`n_m`.

    Returns:
        Qualified names of the converted layers.

    Raises:
        NothingToPruneError: no Linear layer has a 2:4 mask.
        ArgumentError: the device, the precision or a shape is not supported.
        In each case the model is as it was.
    """
    layers = [layer for layer in readable_layers(model) if _is_two_of_four(layer)]
    if not layers:
        raise NothingToPruneError(
            "no Linear layer has a 2:4 mask: call n_m(model, 2, 4) before to_semi_structured"
        )
    converted = {layer: _convert(layer) for layer in layers}
    make_permanent(model)
    for layer, weight in converted.items():
        for module, attribute in layer.holders:
            setattr(module, attribute, nn.Parameter(weight, requires_grad=False))
    return tuple(layer.name for layer in layers)


def _n_m_mask(layer: Layer, n: int, m: int) -> Tensor:
    kept = np.empty(layer.size, dtype=np.bool_)
    for chosen, keys in layer.magnitudes.blocks(rows_together=m):
        grouped = np.moveaxis(keys.reshape(-1, *layer.shape[1:]), layer.input_axis, -1)
        groups = grouped.reshape(*grouped.shape[:-1], -1, m)
        largest = (_ranks(groups) < n) & (groups >= 0)
        flat = np.moveaxis(largest.reshape(grouped.shape), -1, layer.input_axis)
        kept[chosen] = flat.reshape(-1)
    return layer.magnitudes.as_mask(kept)


def _ranks(groups: Keys) -> NDArray[np.int64]:
    """How many of its group come before each weight, `[..., groups, m]`."""
    ranks = np.zeros(groups.shape, dtype=np.int64)
    for index in range(groups.shape[-1]):
        rival = groups[..., index : index + 1]
        ranks += rival > groups
        ranks[..., index + 1 :] += rival == groups[..., index + 1 :]
    return ranks


def _is_two_of_four(layer: Layer) -> bool:
    linear = all(isinstance(module, nn.Linear) for module, _ in layer.holders)
    if not linear or layer.mask is None or layer.shape[1] % 4:
        return False
    return bool((layer.mask.view(layer.shape[0], -1, 4).sum(-1) <= 2).all())


def _convert(layer: Layer) -> Tensor:
    weight = layer.weight.detach()
    remedy = "convert a model on such a GPU, or keep the masks as they are"
    if not weight.is_cuda:
        raise ArgumentError(
            f"layer {layer.name!r} is on {weight.device}, semi-structured weights need a CUDA "
            f"device of compute capability 8.0 or more: {remedy}"
        )
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < _LEAST_CAPABILITY:
        raise ArgumentError(
            f"the device of layer {layer.name!r} has compute capability {capability}, "
            f"semi-structured weights need {_LEAST_CAPABILITY} or more: {remedy}"
        )
    assert layer.mask is not None
    try:
        converted: Tensor = torch.sparse.to_sparse_semi_structured(
            torch.where(layer.mask, weight, 0).contiguous()
        )
    except RuntimeError as error:
        raise ArgumentError(
            f"layer {layer.name!r}, {layer.shape} in {weight.dtype}, cannot be converted "
            f"({error}): use float16 or bfloat16, or leave this layer out of n_m"
        ) from error
    return converted
