"""Slice: the critical neurons of a model."""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.bits import pack, unpack
from nss_prune.core.files import checked_contents, read_file, write_file
from nss_prune.core.schema import check_tensors, names, record, text
from nss_prune.core.text import listing, shortened
from nss_prune.errors import ArgumentError, ModelMismatchError
from nss_prune.graph.axes import check_fits
from nss_prune.graph.bases import BASES, BasisChange, decode_bases, encode_bases, tensors_of_bases
from nss_prune.graph.costs import parameters_left
from nss_prune.graph.encoding import GROUPS, decode_groups, encode_groups, tensors_of_groups
from nss_prune.graph.masking import channels_masked
from nss_prune.graph.neurons import Member, NeuronGroup

KIND = "nss_prune slice"
REQUIRED = {"groups": GROUPS, "kept": names}
OPTIONAL = {"rule": text, "bases": BASES}
HTML_ROWS = 30  # of the table in a notebook


@dataclass(frozen=True)
class Slice:
    """The critical neurons of a model.

    Attributes:
        kept: Layer -> True where a neuron is critical, bool ``[neurons]``.
        groups: The neuron groups that the layers' names stand for.
        rule: How the neurons were chosen, such as "theta 0.95", or "" where it is not known.
        bases: The coordinates in which dimensions inside heads are neurons; the model has others
            until they are removed.
    """

    kept: dict[str, Tensor]
    groups: tuple[NeuronGroup, ...]
    rule: str = ""
    bases: tuple[BasisChange, ...] = ()

    def __repr__(self) -> str:
        layers = [
            (shortened(name, 40), f"{count} of {size}") for name, count, size in self._counts()
        ]
        return "\n".join([self._title(), *listing(layers, 6, "more layers")])

    def _repr_html_(self) -> str:
        counts = self._counts()
        rows = [
            f"<tr><td>{html.escape(name)}</td><td>{count}</td><td>{size}</td></tr>"
            for name, count, size in counts[:HTML_ROWS]
        ]
        if len(counts) > HTML_ROWS:
            rows.append(f'<tr><td colspan="3">... {len(counts) - HTML_ROWS} more layers</td></tr>')
        return (
            f"<table><caption>{html.escape(self._title())}</caption>"
            f"<tr><th>layer</th><th>kept</th><th>of</th></tr>{''.join(rows)}</table>"
        )

    def _counts(self) -> list[tuple[str, int, int]]:
        """(layer, neurons kept, neurons)."""
        return [(name, int(kept.sum()), len(kept)) for name, kept in self.kept.items()]

    def _title(self) -> str:
        counts = self._counts()
        kept, size = sum(count for _, count, _ in counts), sum(size for *_, size in counts)
        rule = f" by {shortened(self.rule, 80)}" if self.rule else ""
        return f"Slice of {kept} of {size} neurons in {len(counts)} layers{rule}"

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
        crossed = set()  # sides on which dimensions of heads go that go as well
        for group in self.groups:
            if group.name not in self.kept:
                continue
            gone = ~self.kept[group.name]
            for member in group.members:
                channels = member.channels[gone[member.neurons]]
                key = (member.name, member.side)
                if key in found:
                    channels = torch.cat([found[key][1], channels])
                if group.is_inside_heads:
                    crossed.add(key)
                found[key] = (member, channels)
        return {
            key: (member, channels.unique() if key in crossed else channels.sort().values)
            for key, (member, channels) in found.items()
            if len(channels)
        }

    def removed_queries(self) -> Iterator[tuple[Member, Tensor]]:
        """Where queries are made that lose dimensions, and the channels of these."""
        for group in self.groups:
            kept = self.kept.get(group.name)
            if group.queries is not None and kept is not None and not kept.all():
                yield group.queries, group.queries.channels[~kept[group.queries.neurons]]

    @contextlib.contextmanager
    def masked(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context, the critical neurons are all that ``model`` has.

        What reads a neuron that is not critical reads zero, and a norm over the neurons sees the
        critical ones only, so outputs equal those of the physically smaller model. Dimensions
        inside heads are masked in their own coordinates: the model has other weights meanwhile.

        Raises:
            ModelMismatchError: ``model`` has other layers or widths than the profiled one.
        """
        check_fits(self.groups, model)
        removed = self.removed_channels().values()
        with channels_masked(model, removed, self.removed_queries(), self.bases):
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
        tensors, notes = read_file(path, KIND, record(REQUIRED, OPTIONAL))
        with checked_contents(path):
            check_tensors(tensors, tensors_of_slice(notes))
            return decode_slice(tensors, notes)

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
    kept = {f"kept/{name}": mask for name, mask in critical.kept.items()}
    tensors |= pack(kept, order="big")
    notes = {"groups": groups, "kept": list(critical.kept)}
    if critical.bases:
        bases, notes["bases"] = encode_bases(critical.bases)
        tensors |= bases
    return tensors, {**notes, "rule": critical.rule} if critical.rule else notes


def tensors_of_slice(notes: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that the notes refer to."""
    kept = [f"kept/{name}" for name in notes["kept"]]
    return [*tensors_of_groups(notes["groups"]), *kept, *tensors_of_bases(notes.get("bases", ()))]


def decode_slice(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Slice:
    """What :func:`encode_slice` encoded."""
    groups = decode_groups(tensors, notes["groups"])
    sizes = {group.name: [group.size] for group in groups}
    packed = {name: tensors[f"kept/{name}"] for name in notes["kept"]}
    kept = unpack(packed, {name: sizes[name] for name in packed}, order="big")
    bases = decode_bases(tensors, notes.get("bases", ()))
    return Slice(kept, groups, notes.get("rule", ""), bases)
