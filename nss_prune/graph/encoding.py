"""Neuron groups as tensors and JSON, for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nss_prune.graph.neurons import Member, NeuronGroup


def encode_groups(groups: Sequence[NeuronGroup]) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors by name, and JSON that refers to them; regular members need no tensor."""
    tensors: dict[str, Tensor] = {}
    notes = []
    for group in groups:
        members = [
            _encode_member(member, group.size, f"group/{group.name}/{number}", tensors)
            for number, member in enumerate(group.members)
        ]
        note = [group.name, group.size, members, group.ties]
        if group.queries is not None:
            key = f"group/{group.name}/queries"
            note.append(_encode_member(group.queries, group.size, key, tensors))
        notes.append(note)
    return tensors, notes


def decode_groups(tensors: Mapping[str, Tensor], notes: Sequence[Any]) -> tuple[NeuronGroup, ...]:
    """What :func:`encode_groups` encoded."""
    return tuple(
        NeuronGroup(
            name,
            size,
            tuple(_decode_member(note, size, tensors) for note in members),
            ties,
            _decode_member(queries[0], size, tensors) if queries else None,
        )
        for name, size, members, ties, *queries in notes
    )


def _encode_member(member: Member, size: int, key: str, tensors: dict[str, Tensor]) -> list[Any]:
    """[name, side, width, axis, key or [offset, repeats], sample axis unless it is the first].

    A regular member holds all neurons in order, each ``repeats`` times, from ``offset`` on.
    """
    offset, repeats = int(member.channels[0]), len(member.neurons) // size
    form: Any = [offset, repeats]
    channels, neurons = _regular(size, offset, repeats)
    if not (torch.equal(member.channels, channels) and torch.equal(member.neurons, neurons)):
        form = key
        tensors[key] = torch.stack([member.channels, member.neurons]).to(torch.int32)
    last = [member.sample_axis] if member.sample_axis else []
    return [member.name, member.side, member.width, member.axis, form, *last]


def _decode_member(note: Sequence[Any], size: int, tensors: Mapping[str, Tensor]) -> Member:
    name, side, width, axis, form, *last = note
    channels, neurons = tensors[form].long() if isinstance(form, str) else _regular(size, *form)
    return Member(name, side, channels, neurons, width, axis, *last)


def _regular(size: int, offset: int, repeats: int) -> tuple[Tensor, Tensor]:
    channels = offset + torch.arange(size * repeats)
    return channels, torch.arange(size).repeat_interleave(repeats)
