"""Neuron groups as tensors and JSON, for files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nss_prune.core.schema import (
    array,
    check_tensor,
    either,
    one_of,
    refuse,
    row,
    text,
    whole,
)
from nss_prune.errors import FileFormatError
from nss_prune.graph.neurons import Member, NeuronGroup

_MEMBER = row(
    text,
    one_of("out", "in", "both"),
    whole(1),
    either(one_of(None), whole(0, 16)),
    either(text, row(whole(), whole(1))),
    optional=whole(1, 16),
)
GROUPS = array(row(text, whole(1), array(_MEMBER), whole(1), optional=_MEMBER))
"""Of the groups in the notes of a file."""

FREE = 2**22  # positions of regular members that a file of any size may describe
PER_BYTE = 256  # further ones for each byte of the file's tensors, and each 1/64 of a member


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
    """What :func:`encode_groups` encoded, and :data:`GROUPS` allows.

    Raises:
        FileFormatError: Groups of one name, positions outside a side, or more positions than a
            file of this size can describe.
    """
    if len({name for name, *_ in notes}) < len(notes):
        raise FileFormatError("two groups have the same name")
    _check_positions(tensors, notes)
    regular = functools.cache(_regular)  # of one size for many members
    return tuple(
        NeuronGroup(
            name,
            size,
            tuple(_decode_member(note, size, tensors, regular) for note in members),
            ties,
            _decode_member(queries[0], size, tensors, regular) if queries else None,
        )
        for name, size, members, ties, *queries in notes
    )


def tensors_of_groups(notes: Sequence[Any]) -> list[str]:
    """Names of the tensors that the notes refer to."""
    forms = (member[4] for _, _, members, _, *queries in notes for member in [*members, *queries])
    return [form for form in forms if isinstance(form, str)]


def _check_positions(tensors: Mapping[str, Tensor], notes: Sequence[Any]) -> None:
    """Before anything is made of them: a few numbers can describe more than memory holds."""
    forms = [
        (size, member) for _, size, members, _, *queries in notes for member in [*members, *queries]
    ]
    regular = {(size, *m[4]) for size, m in forms if not isinstance(m[4], str)}
    paid = sum(tensor.nbytes for tensor in tensors.values()) + 64 * len(forms)
    wanted = sum(size * repeats for size, _, repeats in regular)
    if wanted > FREE + PER_BYTE * paid:
        raise FileFormatError(f"the groups have {wanted} positions, more than this file can have")
    for name, size, members, ties, *_ in notes:
        if any(member in members[:place] for place, member in enumerate(members)):
            raise FileFormatError(f"group {name!r} has a member twice")
        sides = {member[1] for member in members}
        if "both" not in sides and not {"in", "out"} <= sides:
            raise refuse(f"group {name!r}", sorted(sides), "what makes and what consumes it")
        if size * ties > max((member[2] for member in members), default=0):
            raise refuse(f"the size of group {name!r}", [size, ties], "that of a layer")
    for size, (name, _, width, _, form, *_) in forms:
        if not isinstance(form, str) and form[0] + size * form[1] > width:
            raise refuse(f"a side of {name!r}", form, f"{width} positions")


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


def _decode_member(
    note: Sequence[Any],
    size: int,
    tensors: Mapping[str, Tensor],
    regular: Callable[[int, int, int], tuple[Tensor, Tensor]],
) -> Member:
    name, side, width, axis, form, *last = note
    if isinstance(form, str):
        channels, neurons = _irregular(form, tensors[form], size, width)
    else:
        channels, neurons = regular(size, *form)
    return Member(name, side, channels, neurons, width, axis, *last)


def _irregular(key: str, form: Tensor, size: int, width: int) -> tuple[Tensor, Tensor]:
    check_tensor(key, form, (2, None), (torch.int32,))
    channels, neurons = form.long()
    outside = form.numel() == 0 or bool((form < 0).any())
    if outside or int(channels.max()) >= width or int(neurons.max()) >= size:
        raise FileFormatError(f"{key!r} has positions outside {size} neurons on {width} channels")
    return channels, neurons


def _regular(size: int, offset: int, repeats: int) -> tuple[Tensor, Tensor]:
    channels = offset + torch.arange(size * repeats)
    return channels, torch.arange(size).repeat_interleave(repeats)
