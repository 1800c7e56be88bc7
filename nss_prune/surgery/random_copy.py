"""A copy of a model with random weights, and random inputs of the same shapes.

Whether a removal is right is a matter of structure. A model's own weights and inputs may hide that
it is not: branches that start at zero, norms whose statistics are all the same, inputs of zeros.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import clone
from nss_prune.core.nested import map_tensors

POOL = 65537
"""Random numbers that a copy is made of. No width is a multiple of this prime, so that no two
channels become alike where they come round again."""


OBSERVES = "observer_enabled"
"""Buffer of a quantizer that sets its range by all channels it is given, removed ones too. Copies
keep the ranges that they have."""


def random_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy whose weights are random and of ordinary size.

    Weights of layers are normal with the variance 2 / inputs (He et al., 2015), so that signals
    neither vanish nor explode; scales, variances and all else that has one axis are in
    [0.5, 1.5], biases and means around zero. Masks, indices and tables of whole numbers in buffers
    stay.

    Args:
        dtype: Of the floating-point weights and buffers; None for what they have.
    """
    generator = torch.Generator().manual_seed(0)
    pool = _Pool(generator)
    drawn: dict[int, Tensor] = {}
    for module in model.modules():
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and id(value) not in drawn:
                drawn[id(value)] = _drawn(module, name, value, generator, pool, dtype)
    return clone(model, lambda tensor: drawn[id(tensor)])


class _Pool:
    """Normal numbers of which weights are views: all of one standard deviation share memory.

    To write them takes longer than a call of the copy, and to read as many, too.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._numbers = torch.randn(POOL, generator=generator)
        self._rounds: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}

    def view(self, old: Tensor, size: float, dtype: torch.dtype) -> Tensor:
        """In the shape of another tensor, from some place on, round and round.

        Args:
            size: The standard deviation.
        """
        first = int(torch.randint(POOL, (), generator=self._generator))
        end = first + old.numel()
        key = size, old.device, dtype
        if key not in self._rounds or len(self._rounds[key]) < end:
            numbers = (size * self._numbers).to(old.device, dtype)
            self._rounds[key] = numbers.repeat(-(-end // POOL))
        return self._rounds[key][first:end].view(old.shape)


def random_inputs(example_inputs: Any, dtype: torch.dtype | None = None, seed: int = 0) -> Any:
    """Inputs of the same shapes: floats random, whole numbers in another order, masks kept."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return _shuffled(tensor, generator)
        return _like(_random_values(tensor.detach(), generator), tensor, dtype)

    return map_tensors(drawn, example_inputs)


def as_dtype(example_inputs: Any, dtype: torch.dtype | None) -> Any:
    """The inputs with all floating-point tensors in a dtype."""
    return map_tensors(
        lambda tensor: (
            _like(tensor.detach(), tensor, dtype) if tensor.is_floating_point() else tensor
        ),
        example_inputs,
    )


def _like(values: Tensor, old: Tensor, dtype: torch.dtype | None) -> Tensor:
    made = torch.empty_like(old, dtype=dtype or old.dtype, requires_grad=False)
    return made.copy_(values)


def _drawn(
    module: nn.Module,
    name: str,
    value: Tensor,
    generator: torch.Generator,
    pool: _Pool,
    dtype: torch.dtype | None,
) -> Tensor:
    """A tensor in the place of a parameter or buffer."""
    old = value.detach()
    if name == OBSERVES:
        return torch.zeros_like(old)
    if not old.is_floating_point():
        return old.clone()
    if not isinstance(value, nn.Parameter):
        return _like(_random_buffer(name, old, generator), old, dtype)
    lengths = [length for length in old.shape if length > 1]
    if len(lengths) < 2:
        return _like(_random_vector(name, old.shape, generator), old, dtype)
    inputs = old.numel() // lengths[0]
    if isinstance(module, nn.modules.conv._ConvNd) and module.transposed:
        inputs = old.shape[0] // module.groups
    size = 1.0 if isinstance(module, nn.Embedding) else math.sqrt(2 / inputs)
    return pool.view(old, size, dtype or old.dtype)


def _random_vector(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Around zero for biases and means, in [0.5, 1.5] for scales and variances."""
    if "bias" in name or "mean" in name:
        return 0.3 * torch.randn(shape, generator=generator)
    return 0.5 + torch.rand(shape, generator=generator)


def _random_buffer(name: str, old: Tensor, generator: torch.Generator) -> Tensor:
    """Statistics drawn, other tables scaled entry by entry; masks and whole numbers stay."""
    if old.dim() == 1 and name in ("running_mean", "running_var"):
        return _random_vector(name, old.shape, generator)
    finite = old[old.isfinite()]
    whole = bool((finite == finite.round()).all()) or len(finite) < old.numel()
    if not whole:
        return old * (0.5 + torch.rand(old.shape, generator=generator)).to(old)
    if old.dim() == 1 and old.numel() > 1 and bool((old == old[0]).all()):
        around = 0.3 * torch.randn(old.shape, generator=generator).clamp(-2, 2).to(old)
        return around if old[0] == 0 else old * (1 + around)
    return old


def _random_values(values: Tensor, generator: torch.Generator) -> Tensor:
    """Random floats in the place of an input; masks of 0 and 1, and of -inf, stay."""
    if values.numel() == 0 or not bool(values.isfinite().all()):
        return values
    low, high = float(values.min()), float(values.max())
    binary = bool(((values == 0) | (values == 1)).all())
    if (binary and high == 1) or low < torch.finfo(torch.bfloat16).min / 2:
        return values
    if low >= 0 and high > 0:
        return torch.rand(values.shape, generator=generator) * high
    return torch.randn(values.shape, generator=generator) * max(1.0, -low / 4, high / 4)


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The same whole numbers in another order; truth values stay."""
    if tensor.dtype == torch.bool or tensor.numel() == 0:
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    if {low, high} <= {0, 1}:
        return tensor
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)
