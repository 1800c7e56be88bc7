"""Exact changes of basis inside a model: the coordinates of a head are others, its outputs not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nss_prune.core.afterwards import afterwards
from nss_prune.core.models import submodule
from nss_prune.core.schema import array, check_finite, check_tensor, one_of, refuse, row, text

BASES = array(row(text, one_of("out", "in")))
"""Of the changes of basis in the notes of a file."""


@dataclass(frozen=True)
class BasisChange:
    """New coordinates y = M x for blocks of channels, on one side of a linear layer.

    Attributes:
        name: Qualified name of the layer.
        side: "out" of a layer that makes x: its weights become M W; "in" of one that reads x: W M,
            where M is the inverse of the makers'.
        channels: Of each block, ``[blocks, width]``.
        matrices: M of each block, float64 ``[blocks, width, width]``.
    """

    name: str
    side: Literal["out", "in"]
    channels: Tensor
    matrices: Tensor

    def parameters(self, layer: nn.Linear) -> dict[str, Tensor]:
        """Parameter of the layer -> its new values."""
        matrices = self.matrices.to(layer.weight.device)
        channels = self.channels.to(layer.weight.device)
        weight = layer.weight.detach().double()
        if self.side == "in":
            mixed = torch.einsum("obj,bji->obi", weight[:, channels], matrices).flatten(1)
            return {"weight": weight.index_copy(1, channels.flatten(), mixed).to(layer.weight)}
        found = {}
        for name, value in layer.named_parameters(recurse=False):
            rows = value.detach().double().view(len(value), -1)
            mixed = (matrices @ rows[channels]).flatten(0, 1)
            rows = rows.index_copy(0, channels.flatten(), mixed)
            found[name] = rows.view(value.shape).to(value)
        return found


def change_basis(model: nn.Module, changes: Sequence[BasisChange]) -> None:
    """Give a model other coordinates, in place; tensors are replaced and never written to."""
    for change in changes:
        layer: Any = submodule(model, change.name)
        for name, value in change.parameters(layer).items():
            setattr(layer, name, nn.Parameter(value, getattr(layer, name).requires_grad))


@contextlib.contextmanager
def in_basis(model: nn.Module, changes: Sequence[BasisChange]) -> Iterator[None]:
    """Within the context a model has other coordinates; then it is as before."""
    layers = [submodule(model, change.name) for change in changes]
    before = [(layer, dict(layer._parameters)) for layer in layers]

    def put_back() -> None:
        for layer, parameters in before[::-1]:
            layer._parameters.update(parameters)

    with afterwards(put_back):
        change_basis(model, changes)
        yield


def encode_bases(changes: Sequence[BasisChange]) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors by name, and JSON that refers to them."""
    tensors: dict[str, Tensor] = {}
    notes = []
    for number, change in enumerate(changes):
        tensors[f"basis/{number}/channels"] = change.channels.int()
        tensors[f"basis/{number}/matrices"] = change.matrices.contiguous()
        notes.append([change.name, change.side])
    return tensors, notes


def tensors_of_bases(notes: Sequence[Any]) -> list[str]:
    """Names of the tensors that the notes refer to."""
    parts = ("channels", "matrices")
    return [f"basis/{number}/{part}" for number in range(len(notes)) for part in parts]


def decode_bases(tensors: Mapping[str, Tensor], notes: Sequence[Any]) -> tuple[BasisChange, ...]:
    """What :func:`encode_bases` encoded, and :data:`BASES` allows.

    Raises:
        FileFormatError: Tensors of other shapes or types, or negative channels.
    """
    found = []
    for number, (name, side) in enumerate(notes):
        keys = [f"basis/{number}/{part}" for part in ("channels", "matrices")]
        channels, matrices = (tensors[key] for key in keys)
        check_tensor(keys[0], channels, (None, None), (torch.int32,))
        blocks, width = channels.shape
        check_tensor(keys[1], matrices, (blocks, width, width), (torch.float64,))
        check_finite(keys[1], matrices)
        if bool((channels < 0).any()):
            raise refuse(keys[0], int(channels.min()), "channels from 0")
        found.append(BasisChange(name, side, channels.long(), matrices))
    return tuple(found)
