"""What a model and some of its layers give, recorded and compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nss_prune.core.arguments import fresh
from nss_prune.core.models import Forward, call_model, device_of, evaluation
from nss_prune.core.multihead import heads_called
from nss_prune.core.nested import tensors_in
from nss_prune.errors import RemovalError
from nss_prune.graph.axes import input_axis

TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4}
"""Largest difference allowed, as a share of the largest value, by the coarsest dtype inside."""


@dataclass(frozen=True)
class RecordedOutputs:
    """What a model gives for some inputs.

    Attributes:
        layers: (layer, call) -> its output, those channels that stay.
        final: The tensors that the model returns.
        dtype: The coarsest floating-point dtype of all tensors made.
    """

    layers: dict[tuple[str, int], Tensor]
    final: list[Tensor]
    dtype: torch.dtype

    @property
    def are_finite(self) -> bool:
        """Whether there is something to compare, and all of it is finite."""
        return bool(self.layers) and all(map(_is_finite, self.layers.values()))


def recorded(
    model: nn.Module,
    inputs: Any,
    names: Sequence[str],
    kept: Mapping[str, Tensor],
    forward: Forward = call_model,
) -> RecordedOutputs:
    """Run a model in evaluation mode, without gradients; random numbers are always the same.

    Args:
        names: Of the layers whose outputs are recorded.
        kept: Layer -> the only channels of its output that count; all count of other layers.
        forward: Function of (model, inputs) that gives the outputs.
    """
    layers: dict[tuple[str, int], Tensor] = {}
    calls = dict.fromkeys(names, 0)

    def record(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            for tensor in tensors_in(output)[:1]:
                if name in kept:
                    where = kept[name].to(tensor.device)
                    tensor = tensor.index_select(input_axis(module), where)
                layers[name, calls[name]] = tensor.detach().clone()
            calls[name] += 1

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(heads_called(model))
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(record(name))
            stack.callback(handle.remove)
        stack.enter_context(_same_random_numbers(device_of(model)))
        stack.enter_context(evaluation(model))
        stack.enter_context(torch.no_grad())
        precision = stack.enter_context(_Precision())
        final = tensors_in(forward(model, fresh(inputs)))
    return RecordedOutputs(layers, final, precision.coarsest)


def compare(masked: RecordedOutputs, removed: RecordedOutputs) -> None:
    """Raise RemovalError where the outputs of a smaller model differ from those of a masked one."""
    allowed = TOLERANCES.get(masked.dtype, 16 * torch.finfo(masked.dtype).eps)
    wanted, found = ([tuple(t.shape) for t in outputs.final] for outputs in (masked, removed))
    if wanted != found:
        raise RemovalError(f"the outputs were {wanted} and would become {found}")
    if masked.layers.keys() != removed.layers.keys():
        raise RemovalError("the smaller model calls its layers otherwise than the masked one")
    pairs = [
        (f"{name}'s", masked.layers[name, call], removed.layers[name, call])
        for name, call in masked.layers
    ]
    pairs += [("the model's", *both) for both in zip(masked.final, removed.final, strict=True)]
    for owner, expected, actual in pairs:
        difference, scale = _difference(expected, actual)
        if not difference <= allowed * scale:
            raise RemovalError(
                f"{owner} outputs differ by {difference:.3g} from those of the masked model, which "
                f"reach {scale:.3g}, with random weights and inputs. Name the layers that "
                "torch-pruning describes wrongly in ignored_layers"
            )


def _difference(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """The largest difference of two tensors, and the largest finite value of the first."""
    if expected.shape != actual.shape:
        return float("inf"), 0.0
    if not expected.is_floating_point() and not expected.is_complex():
        return float(not torch.equal(expected, actual)), 0.0
    if not expected.is_complex() and expected.numel():  # in two passes, where all is finite
        difference = _largest(expected - actual)
        if math.isfinite(difference):
            return difference, _largest(expected)
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    differs = ~same
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return (float((expected - actual)[differs].abs().max()) if bool(differs.any()) else 0.0), scale


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    low, high = tensor.aminmax()
    return float(torch.maximum(-low, high))


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.numel() or math.isfinite(_largest(tensor))


@contextlib.contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


class _Precision(TorchFunctionMode):
    """Finds the coarsest floating-point dtype of the tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.coarsest = torch.float64

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            eps = torch.finfo(result.dtype).eps
            if eps > torch.finfo(self.coarsest).eps:
                self.coarsest = result.dtype
        return result
