"""What comes in place of a layer: a map to the same shape, fitted by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import evaluation, run, submodule
from nss_prune.deeparc.layers import Layer
from nss_prune.errors import DataError, NumericalError, RemovalError

RIDGE = 1e-5
"""Added to the covariance that a sewing layer is solved from, relative to the mean variance."""

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADDINGS: tuple[Any, ...] = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def sewing_layer(layer: Layer, removed: nn.Module) -> nn.Module:
    """A map from what a layer reads to the shape of what it gives, with fresh weights.

    Raises:
        RemovalError: No 1 x 1 convolution or linear map does that.
    """
    read, made = layer.read, layer.made
    if read == made:
        return nn.Identity()
    spatial = len(read) - 1
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in removed.modules())
    if convolves and len(read) == len(made) and 1 <= spatial <= len(CONVOLUTIONS):
        steps = [_stride(before, after) for before, after in zip(read[1:], made[1:], strict=True)]
        if all(stride > 0 for stride, _ in steps):
            return _convolution(read[0], made[0], steps)
    elif read[:-1] == made[:-1]:
        return nn.Linear(read[-1], made[-1])
    raise RemovalError(
        f"{layer.name} makes {list(made)} of {list(read)}, which no 1 x 1 convolution or linear "
        "map does; leave it out of layers="
    )


def _stride(before: int, after: int) -> tuple[int, int]:
    """Stride of a 1 x 1 convolution between two sizes, and positions to crop first.

    The stride is 0 where the size grows.
    """
    for stride in range(1, before + 1):
        if (before - 1) // stride + 1 == after:
            return stride, 0
    stride = before // after
    return stride, before - stride * after


def _convolution(read: int, made: int, steps: Sequence[tuple[int, int]]) -> nn.Module:
    """A 1 x 1 convolution with a (stride, crop) for each spatial axis."""
    strides = tuple(stride for stride, _ in steps)
    convolution: nn.Module = CONVOLUTIONS[len(steps) - 1](read, made, 1, stride=strides)
    if not any(crop for _, crop in steps):
        return convolution
    # From the last axis to the first, as padding is given.
    padding = [-part for _, crop in reversed(steps) for part in (crop // 2, crop - crop // 2)]
    return nn.Sequential(PADDINGS[len(steps) - 1](tuple(padding), 0.0), convolution)


def fit(
    sewing: nn.Module, layer: Layer, model: nn.Module, smaller: nn.Module, batches: Iterable[Any]
) -> None:
    """Set the weights of a sewing layer by least squares.

    Args:
        sewing: In ``smaller``, in place of the layer; it is fitted to give what the layer gave
            from what it reads now.
        layer: Of ``model``.
        batches: Inputs.

    Raises:
        DataError: There are none, or a model refuses them.
        NumericalError: What is read or given is NaN or infinite.
    """
    linear: Any = next(m for m in sewing.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS)))
    regression = Regression()
    last = submodule(model, layer.parts[-1])
    with evaluation(model), evaluation(smaller), torch.no_grad():
        for number, inputs in enumerate(batches):
            _, made = _seen(last, model, inputs, number)
            read, _ = _seen(linear, smaller, inputs, number)
            regression.add(*_rows(linear, read, made))
        weight, bias = regression.solve(layer.name)
        linear.weight.copy_(weight.reshape(linear.weight.shape))
        linear.bias.copy_(bias)


def _seen(module: nn.Module, model: nn.Module, inputs: Any, number: int) -> tuple[Tensor, Tensor]:
    """What a module reads and gives for a batch."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        seen.append((given[0].clone(), output.clone()))

    with module.register_forward_hook(see):
        run(model, inputs, number)
    if not seen:
        raise DataError(
            f"a {type(module).__name__} to sew does not run on batch {number}; name the layers in "
            "layers="
        )
    return seen[0]


def _rows(linear: nn.Module, read: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """What a linear layer reads and should give, position by position, ``[rows, channels]``."""
    if isinstance(linear, CONVOLUTIONS):
        picked = (slice(None), slice(None), *(slice(None, None, step) for step in linear.stride))
        read, made = read[picked].movedim(1, -1), made.movedim(1, -1)
    return read.flatten(0, -2).double(), made.flatten(0, -2).double()


class Regression:
    """Linear least squares with an intercept, in float64, from rows that stream by."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, read: Tensor, made: Tensor) -> None:
        """Add observations ``[rows, inputs]`` and ``[rows, outputs]``."""
        ones = read.new_ones(len(read), 1)
        read = torch.cat([read, ones], dim=1)
        sums = [read.T @ read, read.T @ made]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def solve(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight ``[outputs, inputs]`` and bias ``[outputs]`` of the best affine map.

        Args:
            name: For messages.

        Raises:
            DataError: Nothing was added.
            NumericalError: NaN or infinite values were added.
        """
        if not self._sums:
            raise DataError(f"no data to fit the sewing layer of {name} to; give at least a batch")
        squares, products = self._sums
        rows = squares[-1, -1]
        mean_read, mean_made = squares[-1, :-1] / rows, products[-1] / rows
        covariance = squares[:-1, :-1] / rows - torch.outer(mean_read, mean_read)
        shared = products[:-1] / rows - torch.outer(mean_read, mean_made)
        if not (torch.isfinite(covariance).all() and torch.isfinite(shared).all()):
            raise NumericalError(
                f"what {name} reads or gives is NaN or infinite; check the data and the weights"
            )
        variance = covariance.diagonal().mean()
        ridge = RIDGE * variance if variance > 0 else torch.ones_like(variance)
        covariance.diagonal().add_(ridge)
        weight = torch.cholesky_solve(shared, torch.linalg.cholesky(covariance)).T
        return weight, mean_made - weight @ mean_read


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put modules in the place, and the training mode, of those of the same names."""
    for name, module in replacements.items():
        module.train(submodule(model, name).training)
        parent, _, attribute = name.rpartition(".")
        setattr(submodule(model, parent), attribute, module)
