"""How long a call of the model takes with any number of neurons left, predicted from four widths.

The model is timed as it is and with three quarters, half and a quarter of the neurons of every
group. Between these, the seconds of a layer are interpolated by the share that is left of its
parameters, and those of everything without parameters, which the layers leave of a call, by the
share of all neurons that is left. Below a quarter they stay as they are there.
"""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from nss_prune.allocation.budget import Limits, limited
from nss_prune.core.models import call_model, evaluation
from nss_prune.graph.costs import ParameterCount
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice

WIDTHS = (0.25, 0.5, 0.75, 1.0)
CALLS = 9  # timed, of which the median counts
WARM_UP = 3


Forward = Callable[[nn.Module, Any], Any]


Remove = Callable[[nn.Module, Slice], Any]


Timing = Callable[[nn.Module, Any, Forward], dict[str, float]]
"""Seconds of one call by layer; "" is the whole call."""


class Latency:
    """Seconds of a call for any slice.

    Args:
        groups: What may be removed.
        model: Left as it is.
        example_inputs: Of the call that is timed, on the device that counts.
        remove: Removes all outside a slice from a copy of the model, in place.
        forward: Calls the model.
        timing: Times a model, on a machine with nothing else to do; :func:`seconds_by_layer` by
            default.

    Attributes:
        whole: Those of the model as it is.
    """

    def __init__(
        self,
        groups: Sequence[NeuronGroup],
        model: nn.Module,
        example_inputs: Any,
        remove: Remove,
        forward: Forward = call_model,
        timing: Timing | None = None,
    ) -> None:
        self._count = ParameterCount(groups, model)
        self._sizes = {name: value.numel() for name, value in model.named_parameters()}
        self._parameters = {
            name: [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters()]
            for name, module in leaves(model)
        }
        timed = seconds_by_layer if timing is None else timing
        points = []
        for width in WIDTHS:
            critical = evenly(groups, width)
            narrower = model
            if width < 1:
                narrower = copy.deepcopy(model)
                remove(narrower, critical)
            points.append((critical, timed(narrower, example_inputs, forward)))
        self.whole: float = points[-1][1][""]
        self._curves = self._interpolated(points)

    def seconds(self, critical: Slice) -> float:
        """Of a call of what a slice keeps."""
        shares = self._shares(critical)
        return sum(float(np.interp(shares[name], *curve)) for name, curve in self._curves.items())

    def _interpolated(
        self, points: Sequence[tuple[Slice, Mapping[str, float]]]
    ) -> dict[str, tuple[list[float], list[float]]]:
        """Layer -> shares that are left of it, ascending, and its seconds; "" is all the rest."""
        curves: dict[str, tuple[list[float], list[float]]] = {}
        for critical, timed in points:
            alone = {name: timed[name] for name in self._parameters if name in timed}
            rest = max(0.0, timed[""] - sum(alone.values()))
            shares = self._shares(critical)
            for name, seconds in {**alone, "": rest}.items():
                known, times = curves.setdefault(name, ([], []))
                known.append(shares[name])
                # Less work is never predicted to take longer.
                times.append(max(seconds, times[-1]) if times else seconds)
        return curves

    def _shares(self, critical: Slice) -> dict[str, float]:
        left = self._count.left(critical.kept)
        shares = {}
        for name, keys in self._parameters.items():
            own = [key for key in keys if key in left]
            size = sum(self._sizes[key] for key in own)
            shares[name] = sum(left[key] for key in own) / size if size else 1.0
        neurons = [kept.double().mean().item() for kept in critical.kept.values()]
        shares[""] = statistics.fmean(neurons) if neurons else 1.0
        return shares


def evenly(groups: Sequence[NeuronGroup], width: float) -> Slice:
    """The first neurons of every group, a share ``width`` of them, one at least."""
    kept = {}
    for group in groups:
        count = max(1, math.ceil(width * group.size))
        kept[group.name] = torch.arange(group.size) < count
    sizes = {group.name: group.size for group in groups}
    return limited(Slice(kept, tuple(groups)), Limits(), lambda name: torch.ones(sizes[name]))


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules without children that have parameters."""
    for name, module in model.named_modules():
        if not any(module.children()) and any(True for _ in module.parameters()):
            yield name, module


def seconds_by_layer(
    model: nn.Module, example_inputs: Any, forward: Forward = call_model
) -> dict[str, float]:
    """Median seconds of one call in evaluation mode, of every leaf with parameters and in all."""
    calls: list[dict[str, float]] = []
    wait = _synchronizing(model)
    with evaluation(model), torch.no_grad(), contextlib.ExitStack() as stack:
        for name, layer in leaves(model):
            _time(name, layer, calls, wait, stack)
        for _ in range(WARM_UP + CALLS):
            calls.append({})
            wait()
            begin = time.perf_counter()
            forward(model, example_inputs)
            wait()
            calls[-1][""] = time.perf_counter() - begin
    timed = calls[WARM_UP:]
    return {name: statistics.median(call.get(name, 0.0) for call in timed) for name in timed[0]}


def _time(
    name: str,
    layer: nn.Module,
    calls: list[dict[str, float]],
    wait: Callable[[], None],
    stack: contextlib.ExitStack,
) -> None:
    """Hooks that add the seconds of a layer to the last call."""
    begun: list[float] = []

    def before(*_: Any) -> None:
        wait()
        begun.append(time.perf_counter())

    def after(*_: Any) -> None:
        wait()
        spent = time.perf_counter() - begun.pop()
        calls[-1][name] = calls[-1].get(name, 0.0) + spent

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(layer.register_forward_hook(after).remove)


def _synchronizing(model: nn.Module) -> Callable[[], None]:
    """What waits for the model's device."""
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None
