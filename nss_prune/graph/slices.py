"""Slice: the critical neurons of a model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nss_prune.core.files import read_file, write_file
from nss_prune.core.models import submodule
from nss_prune.errors import ArgumentError, ModelMismatchError
from nss_prune.graph.axes import check_fits
from nss_prune.graph.costs import parameters_left
from nss_prune.graph.encoding import decode_groups, encode_groups
from nss_prune.graph.masking import normalize_without, zero_inputs
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.graph.norms import norm_of

KIND = "nss_prune slice"


@dataclass(frozen=True)
class Slice:
    """The critical neurons of a model.

    Attributes:
        kept: Layer -> True where a neuron is critical, bool ``[neurons]``.
        groups: The neuron groups that the layers' names stand for.
    """

    kept: dict[str, Tensor]
    groups: tuple[NeuronGroup, ...]

    def __post_init__(self) -> None:
        sizes = {group.name: group.size for group in self.groups}
        for name, kept in self.kept.items():
            if name not in sizes or kept.shape != (sizes[name],) or kept.dtype != torch.bool:
                raise ModelMismatchError(
                    f"kept[{name!r}] is {kept.dtype} {tuple(kept.shape)}; allowed are bool masks "
                    f"over {sizes}"
                )
            if not kept.any():
                raise ArgumentError(f"kept[{name!r}] keeps no neuron; keep at least one")

    @property
    def removed(self) -> dict[str, Tensor]:
        """Layer -> indices of the neurons that are not critical, where there are any."""
        return {
            name: (~kept).nonzero().flatten() for name, kept in self.kept.items() if not kept.all()
        }

    def removed_channels(self) -> dict[tuple[str, str], tuple[Member, Tensor]]:
        """(module, "out" | "in" | "both") -> a member of that side, and its channels to remove.

        A side may belong to several groups (a concat); their channels are united.
        """
        found: dict[tuple[str, str], tuple[Member, Tensor]] = {}
        for group in self.groups:
            if group.name not in self.kept:
                continue
            gone = ~self.kept[group.name]
            for member in group.members:
                channels = member.channels[gone[member.neurons]]
                key = (member.name, member.side)
                if key in found:
                    channels = torch.cat([found[key][1], channels])
                found[key] = (member, channels)
        return {
            key: (member, channels.sort().values)
            for key, (member, channels) in found.items()
            if len(channels)
        }

    @contextlib.contextmanager
    def masked(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context, the critical neurons are all that ``model`` has.

        What reads a neuron that is not critical reads zero, and a norm over the neurons sees the
        critical ones only, so outputs equal those of the physically smaller model.

        Raises:
            ModelMismatchError: ``model`` has other layers or widths than the profiled one.
        """
        check_fits(self.groups, model)
        with contextlib.ExitStack() as stack:
            for (name, side), (member, channels) in self.removed_channels().items():
                norm = norm_of(member, model)
                if norm is not None:
                    stack.callback(normalize_without(norm, member.width, channels).remove)
                elif side == "in" and member.axis is None:
                    stack.callback(zero_inputs(submodule(model, name), channels).remove)
            yield model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the slice as safetensors, one bit a neuron, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        write_file(path, KIND, *encode_slice(self))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Slice:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: The file is damaged, foreign, or of a newer version.
            OSError: The file cannot be read.
        """
        return decode_slice(*read_file(path, KIND))

    def compression_rate(self, model: nn.Module) -> float:
        """Share of the parameters of ``model`` that belong to neurons outside the slice.

        It equals the share that is gone after the physical removal.
        """
        left = parameters_left(self.groups, self.kept, model)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        return 1 - sum(left.values()) / sum(sizes.values())


def encode_slice(critical: Slice) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, one bit a neuron, and JSON that refers to them."""
    tensors, groups = encode_groups(critical.groups)
    for name, kept in critical.kept.items():
        tensors[f"kept/{name}"] = torch.from_numpy(np.packbits(kept.cpu().numpy()))
    return tensors, {"groups": groups, "kept": list(critical.kept)}


def decode_slice(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Slice:
    """What :func:`encode_slice` encoded."""
    groups = decode_groups(tensors, notes["groups"])
    sizes = {group.name: group.size for group in groups}
    kept = {
        name: torch.from_numpy(
            np.unpackbits(tensors[f"kept/{name}"].numpy(), count=sizes[name])
        ).bool()
        for name in notes["kept"]
    }
    return Slice(kept, groups)
