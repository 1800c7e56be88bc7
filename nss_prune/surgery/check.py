"""Compare the smaller model with the masked one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import Forward, evaluation, training
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.errors import RemovalError

PIECE = 32  # pixels; what models that halve their maps five times can divide


def masked_outputs(
    model: nn.Module, example_inputs: Any, forward: Forward
) -> tuple[Any, list[Tensor]]:
    """Inputs that a masked model takes, small ones if it can, and what it makes of them."""
    with evaluation(model), torch.no_grad():
        small = map_tensors(_piece, example_inputs)
        if any(len(tensor) for tensor in tensors_in(small)):
            with contextlib.suppress(Exception):
                return small, [tensor.clone() for tensor in tensors_in(forward(model, small))]
        try:
            outputs = tensors_in(forward(model, example_inputs))
        except Exception as error:
            raise RemovalError(
                f"the masked model does not run: {error}; name the layer in ignored_layers"
            ) from error
        return example_inputs, [tensor.clone() for tensor in outputs]


def _piece(tensor: Tensor) -> Tensor:
    """A quarter of a picture's height and width, in multiples of 32 pixels."""
    if tensor.dim() != 4 or min(tensor.shape[2:]) < 2 * PIECE:
        return tensor
    height, width = (-(-side // (4 * PIECE)) * PIECE for side in tensor.shape[2:])
    return tensor[..., :height, :width]


@contextlib.contextmanager
def layers_used(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The layers with parameters that are called inside."""
    used: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        for layer in model.modules():
            if has_parameters(layer):
                hook = layer.register_forward_pre_hook(lambda called, _: used.add(called))
                stack.callback(hook.remove)
        yield used


def has_parameters(layer: nn.Module) -> bool:
    return any(parameter is not None for parameter in layer._parameters.values())


def trains_any(
    model: nn.Module, layers: set[nn.Module], example_inputs: Any, forward: Forward
) -> bool:
    """Whether a call in training mode works, and uses some of these layers."""
    with layers_used(model) as used, training(model), torch.no_grad():
        try:
            forward(model, example_inputs)
        except Exception:
            return False
    return not used.isdisjoint(layers)


def is_finite(model: nn.Module, example_inputs: Any, forward: Forward) -> bool:
    with evaluation(model), torch.no_grad():
        outputs = tensors_in(forward(model, example_inputs))
    return all(bool(torch.isfinite(tensor).all()) for tensor in outputs)


def check_outputs(expected: list[Tensor], actual: list[Tensor]) -> None:
    """Raise RemovalError unless shapes and values agree to the precision of the dtype."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise RemovalError(
            f"the outputs were {[tuple(t.shape) for t in expected]} and would become "
            f"{[tuple(t.shape) for t in actual]}; the model was put back"
        )
    for wanted, found in zip(expected, actual, strict=True):
        if not wanted.is_floating_point():
            continue
        allowed = 10 * torch.finfo(wanted.dtype).eps ** 0.5
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        difference = float((wanted - found).abs().max()) if wanted.numel() else 0.0
        if not difference <= allowed * max(scale, torch.finfo(wanted.dtype).tiny):
            raise RemovalError(
                f"the smaller model's outputs differ by {difference:.3g} from the masked "
                f"model's, which reach {scale:.3g}; the model was put back. Name the layers that "
                "torch-pruning describes wrongly in ignored_layers"
            )
