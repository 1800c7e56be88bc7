"""Connectors in place of removed layers: linear maps to the same shape, by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.compensation.ridge import solve_ridge
from nss_prune.core.hooks import attached
from nss_prune.core.models import evaluation, run, submodule
from nss_prune.deeparc.layers import Layer
from nss_prune.errors import DataError, NumericalError, RemovalError

RIDGE = 1e-5
"""Added to the covariance that a connector is solved from, relative to the mean variance."""

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PADDINGS: tuple[Any, ...] = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def make_connector(layer: Layer, removed: nn.Module) -> nn.Module:
    """A map from a layer's input to the shape of its output, with fresh weights.

    Raises:
        RemovalError: No 1 x 1 convolution or linear map does that.
    """
    before, after = layer.input_shape, layer.output_shape
    if before == after:
        return nn.Identity()
    spatial = len(before) - 1
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in removed.modules())
    if convolves and len(before) == len(after) and 1 <= spatial <= len(CONVOLUTIONS):
        steps = [_stride(*sizes) for sizes in zip(before[1:], after[1:], strict=True)]
        if all(stride > 0 for stride, _ in steps):
            return _convolution(before[0], after[0], steps)
    elif before[:-1] == after[:-1]:
        return nn.Linear(before[-1], after[-1])
    raise RemovalError(
        f"{layer.name} makes {list(after)} of {list(before)}, which no 1 x 1 convolution or linear "
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


def _convolution(inputs: int, outputs: int, steps: Sequence[tuple[int, int]]) -> nn.Module:
    """A 1 x 1 convolution with a (stride, crop) for each spatial axis."""
    strides = tuple(stride for stride, _ in steps)
    convolution: nn.Module = CONVOLUTIONS[len(steps) - 1](inputs, outputs, 1, stride=strides)
    if not any(crop for _, crop in steps):
        return convolution
    # From the last axis to the first, as padding is given.
    padding = [-part for _, crop in reversed(steps) for part in (crop // 2, crop - crop // 2)]
    return nn.Sequential(PADDINGS[len(steps) - 1](tuple(padding), 0.0), convolution)


def fit(
    connector: nn.Module, layer: Layer, model: nn.Module, smaller: nn.Module, batches: Iterable[Any]
) -> None:
    """Set the weights of a connector by least squares.

    Args:
        connector: In ``smaller``, in place of the layer; it is fitted to give the layer's output
            from its own input there.
        layer: Of ``model``.
        batches: Inputs.

    Raises:
        DataError: There are none, or a model refuses them.
        NumericalError: Inputs or outputs of the layer are NaN or infinite.
    """
    linear: Any = next(m for m in connector.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS)))
    regression = Regression()
    last = submodule(model, layer.parts[-1])
    with evaluation(model), evaluation(smaller), torch.no_grad():
        for number, batch in enumerate(batches):
            _, outputs = _captured(last, model, batch, number)
            inputs, _ = _captured(linear, smaller, batch, number)
            regression.add(*_rows(linear, inputs, outputs))
        weight, bias = regression.solve(layer.name)
        linear.weight.copy_(weight.reshape(linear.weight.shape))
        linear.bias.copy_(bias)


def _captured(
    module: nn.Module, model: nn.Module, batch: Any, number: int
) -> tuple[Tensor, Tensor]:
    """Input and output of a module for a batch."""
    found: list[tuple[Tensor, Tensor]] = []

    def capture(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        found.append((arguments[0].clone(), output.clone()))

    with attached((module.register_forward_hook, capture)):
        run(model, batch, number)
    if not found:
        raise DataError(
            f"a {type(module).__name__} to replace does not run on batch {number}; name the layers "
            "in layers="
        )
    return found[0]


def _rows(linear: nn.Module, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Input and wanted output of a linear layer, position by position, ``[rows, channels]``."""
    if isinstance(linear, CONVOLUTIONS):
        picked = (slice(None), slice(None), *(slice(None, None, step) for step in linear.stride))
        inputs, outputs = inputs[picked].movedim(1, -1), outputs.movedim(1, -1)
    return inputs.flatten(0, -2).double(), outputs.flatten(0, -2).double()


class Regression:
    """Linear least squares with an intercept, in float64, from rows that stream by."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add observations ``[rows, inputs]`` and ``[rows, outputs]``."""
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        sums = [inputs.T @ inputs, inputs.T @ outputs]
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
            raise DataError(f"no data to fit the connector of {name} to; give at least a batch")
        squares, products = self._sums
        rows = squares[-1, -1]
        mean_input, mean_output = squares[-1, :-1] / rows, products[-1] / rows
        covariance = squares[:-1, :-1] / rows - torch.outer(mean_input, mean_input)
        cross = products[:-1] / rows - torch.outer(mean_input, mean_output)
        if not (torch.isfinite(covariance).all() and torch.isfinite(cross).all()):
            raise NumericalError(
                f"the input or output of {name} is NaN or infinite; check the data and the weights"
            )
        variance = covariance.diagonal().mean()
        penalty = RIDGE * variance if variance > 0 else torch.ones_like(variance)
        weight = solve_ridge(covariance, cross.T, penalty)
        return weight, mean_output - weight @ mean_input


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> None:
    """Put modules in the place, and the training mode, of those of the same names."""
    for name, module in replacements.items():
        module.train(submodule(model, name).training)
        parent, _, attribute = name.rpartition(".")
        setattr(submodule(model, parent), attribute, module)
