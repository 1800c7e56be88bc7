"""Within which limits neurons are chosen: how many of a layer stay at least, in multiples of what.

Multiples are the widths that hardware is fast with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from nss_prune.allocation.budget import FLOOR, Limits
from nss_prune.errors import ArgumentError
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.norms import least_neurons
from nss_prune.pruner.subject import Subject

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


def limits_of(
    subject: Subject, first_sizes: Mapping[str, int], max_pruning_ratio: float, round_to: RoundTo
) -> Iterator[Limits]:
    """The limits; where ``round_to`` is "auto" several, the coarsest first and the exact one last.

    Args:
        first_sizes: Layer -> neurons before the first step.
        max_pruning_ratio: Share of the neurons that a layer may lose over all steps.
    """
    share = 1 - max_pruning_ratio
    least = {name: math.ceil(size * share - 1e-9) for name, size in first_sizes.items()}
    for group in subject.groups:
        few = least_neurons(group, subject.model)
        least[group.name] = max(few, least.get(group.name, 1))
    heads = (
        group.name
        for group in subject.groups
        if not group.has_channels and not group.is_inside_heads
    )
    floor = {name: math.ceil(size * FLOOR) for name, size in first_sizes.items()}
    plain = Limits(least, 1, frozenset(heads), floor)
    return roundings(plain, round_to, subject.groups, first_sizes, subject.model)


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
