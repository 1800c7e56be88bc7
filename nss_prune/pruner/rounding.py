"""Which layers keep neurons in multiples of what: widths that hardware is fast with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from nss_prune.allocation.budget import Limits
from nss_prune.errors import ArgumentError
from nss_prune.graph.neurons import NeuronGroup

RoundTo = int | Literal["auto"] | None

AUTO: Literal["auto"] = "auto"

WIDE = 64
"""Channels from which on "auto" rounds a layer: a multiple is a small step of it then."""

MULTIPLE, MULTIPLE_IN_HALF = 8, 16
"""What vector units and tensor cores take at once, in float32 and in half precision."""


def check_round_to(given: object) -> RoundTo:
    """The value itself.

    Raises:
        ArgumentError: It is no number of neurons, nor "auto" or None.
    """
    if given is None or given == AUTO:
        return given  # type: ignore[return-value]
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return given
    raise ArgumentError(f"round_to is {given!r}; give a whole number from 1, 'auto' or None")


def roundings(
    limits: Limits,
    round_to: RoundTo,
    groups: tuple[NeuronGroup, ...],
    first_sizes: Mapping[str, int],
    model: nn.Module,
) -> Iterator[Limits]:
    """The limits with a rounding; for "auto" several, the coarsest first and the exact one last.

    Args:
        first_sizes: Layer -> neurons before the first step.
    """
    if round_to != AUTO:
        yield replace(limits, round_to=round_to or 1)
        return
    narrow = {
        group.name
        for group in groups
        if group.ties * first_sizes.get(group.name, group.size) < WIDE
    }
    rounded = replace(limits, unrounded=limits.unrounded | narrow)
    multiple = MULTIPLE_IN_HALF if _is_half(model) else MULTIPLE
    while multiple >= 1:
        yield replace(rounded, round_to=multiple)
        multiple //= 2


def _is_half(model: nn.Module) -> bool:
    return any(value.dtype in (torch.float16, torch.bfloat16) for value in model.parameters())
