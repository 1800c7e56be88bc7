"""Seconds of a call before and after a change, measured when they are first read."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from nss_prune.core.models import (
    Forward,
    call_model,
    clone,
    device_of,
    evaluation,
    without_values,
)
from nss_prune.core.timing import alternating, least_seconds, wait_for

ROUNDS = 15  # in which both models are timed once
PATIENCE = 2.0  # seconds after which no further round begins
SPREAD = 0.05  # of the weights that a model is timed with


class MetaCopy:
    """A model without values, on the meta device, to time it later as it is now.

    How long a call takes depends on shapes alone, where a copy without values can be called.

    Args:
        example_inputs: Inputs of one call; they are held.
        forward: Function of (model, inputs) that gives the outputs.

    Attributes:
        model: The copy, on torch's "meta" device.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, forward: Forward = call_model
    ) -> None:
        self._numbers: dict[str, Tensor] = {
            name: buffer.detach().clone()
            for name, buffer in model.named_buffers()
            if not buffer.is_floating_point()
        }
        self._device = device_of(model)
        self._called = example_inputs, forward
        self.model = clone(model, without_values)

    @contextlib.contextmanager
    def calling(self) -> Iterator[Callable[[], None]]:
        """Within the context, what it yields is one call with random weights."""
        model, (inputs, forward) = self.filled(), self._called

        def call() -> None:
            forward(model, inputs)
            wait_for(self._device)

        with evaluation(model), torch.no_grad(), torch.random.fork_rng():
            yield call

    def filled(self) -> nn.Module:
        """A copy with random weights on the model's own device."""
        kept = {id(self.model.get_buffer(name)): value for name, value in self._numbers.items()}
        generator = torch.Generator(self._device).manual_seed(0)

        def filled(tensor: Tensor) -> Tensor:
            if id(tensor) in kept:
                return kept[id(tensor)]
            made = torch.zeros_like(tensor, device=self._device)
            if made.is_floating_point():
                made.normal_(0, SPREAD, generator=generator)
            return made

        return clone(self.model, filled)


class LateSeconds(Sequence[float]):
    """Seconds of a call before and after a change, measured when they are first read.

    A copy or pickle of it is a tuple. NaN stands for a call that fails.

    Args:
        before, after: The seconds, or what they are to be measured of.
    """

    def __init__(self, before: float | MetaCopy, after: float | MetaCopy) -> None:
        self._sides = (before, after)
        self._measured: tuple[float, ...] | None = None

    def _read(self) -> tuple[float, ...]:
        if self._measured is None:
            self._measured = _seconds(*self._sides)
            self._sides = (math.nan, math.nan)  # nothing is held any more
        return self._measured

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[float]: ...
    def __getitem__(self, index: int | slice) -> float | Sequence[float]:
        return self._read()[index]

    def __len__(self) -> int:
        return 2

    def __repr__(self) -> str:
        return "to be measured" if self._measured is None else repr(self._measured)

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self._read(),)


def _seconds(before: float | MetaCopy, after: float | MetaCopy) -> tuple[float, float]:
    """The median of calls in turns, where both are to be measured."""
    if isinstance(before, float) or isinstance(after, float):
        return _alone(before), _alone(after)
    try:
        with before.calling() as one, after.calling() as other:
            found = alternating({"before": one, "after": other}, ROUNDS, PATIENCE, least=2)
    except Exception:  # of one of them
        return _alone(before), _alone(after)
    return found["before"].median, found["after"].median


def _alone(side: float | MetaCopy) -> float:
    if isinstance(side, float):
        return side
    try:
        with side.calling() as call:
            return least_seconds(call)
    except Exception:  # of memory, or of a device that is no longer there
        return math.nan
