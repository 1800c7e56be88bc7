"""The classifier of a model: the layer that makes its class scores."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nss_prune.core.models import Forward, call_model, evaluation, run, submodule
from nss_prune.core.outputs import class_scores
from nss_prune.errors import ArgumentError, ModelMismatchError

ROUNDING = 32
"""Units in the last place by which moved scores may differ from a shift of the bias."""


def find_classifier(model: nn.Module, classifier: nn.Module | str | None = None) -> str:
    """The qualified name of the classifier, without a call of the model.

    Args:
        classifier: The layer or its name; by default the last Linear layer, or the last
            convolution where there is none.

    Raises:
        ModelMismatchError: The model does not have it.
        ArgumentError: The model has no such layer.
    """
    if isinstance(classifier, str):
        submodule(model, classifier)
        return classifier
    if classifier is not None:
        named: dict[str, nn.Module] = dict(model.named_modules())
        names = [name for name, module in named.items() if module is classifier]
        if not names:
            raise ModelMismatchError(
                f"head is a {type(classifier).__name__} that is not in the model; pass its own "
                "layer"
            )
        return names[0]
    layers = dict(_candidates(model))
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    for name in (*linear, *layers):
        return name
    raise ArgumentError("the model has no Linear or convolution layer; name its head with head=")


def find_classifier_by_shift(
    model: nn.Module,
    inputs: Any,
    number: int = 0,
    *,
    scores: Callable[[Any], Tensor] = class_scores,
    forward: Forward = call_model,
) -> str | None:
    """The last layer whose bias moves the class scores by as much, found by trial.

    Args:
        inputs: Of one call of the model, on its device.
        number: Of the batch, for messages.
        scores: Function of the outputs that gives the class scores, ``[samples, classes, ...]``.
        forward: Calls the model on the inputs.

    Returns:
        Its qualified name; None where no layer's bias does.

    Raises:
        DataError: The model refuses the inputs or gives no class scores. In every case the model
            is as before.
    """
    with evaluation(model), torch.no_grad():
        before = scores(run(model, inputs, number, forward))
        classes, size = before.shape[1], max(1.0, float(before.abs().max()))
        shift = torch.linspace(-size, size, classes).to(before)
        for name, layer in _candidates(model):
            if outputs_of(model, name) != classes:
                continue
            with _shifted(layer, shift):
                moved = scores(run(model, inputs, number, forward)) - before
            missed = float((moved.movedim(1, -1) - shift).abs().max())
            if missed <= ROUNDING * torch.finfo(before.dtype).eps * size:
                return name
    return None


def outputs_of(model: nn.Module, classifier: str) -> int:
    """How many outputs a layer has, by its qualified name."""
    layer: Any = submodule(model, classifier)
    for width in ("out_features", "out_channels"):
        if isinstance(getattr(layer, width, None), int):
            return int(getattr(layer, width))
    return int(layer.weight.shape[0])


def shifted_bias(layer: Any, shift: Tensor) -> nn.Parameter:
    """The bias of a layer plus a shift, ``[outputs]``; a new one where it has none."""
    like = layer.weight if layer.bias is None else layer.bias
    old = 0.0 if layer.bias is None else layer.bias.detach().cpu().double()
    return nn.Parameter((old + shift.cpu().double()).to(like), like.requires_grad)


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions, from the last registered to the first."""
    named: list[tuple[str, nn.Module]] = list(model.named_modules())
    for name, module in reversed(named):
        if isinstance(module, (nn.Linear, _ConvNd)):
            yield name, module


@contextlib.contextmanager
def _shifted(layer: Any, shift: Tensor) -> Iterator[None]:
    before = layer.bias
    layer.bias = shifted_bias(layer, shift)
    try:
        yield
    finally:
        layer.bias = before
