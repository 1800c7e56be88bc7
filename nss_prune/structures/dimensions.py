"""Dimensions inside the heads: dimension j of every head of a layer is a neuron.

A head uses its queries and keys only in the products qᵀk, and its values only through the layer
that reads them, so its coordinates can be chosen freely: with q' = A q and k' = A⁻ᵀ k the scores
are the same, and with v' = R v what reads the values takes R⁻¹. In coordinates in which the first
dimensions matter most (:mod:`nss_prune.allocation.head_bases`) the last ones of all heads can go.
The products are scaled as before: where attention finds its scale from the width of a head, √(r/d)
goes into the queries.

Queries and keys have as many dimensions as values: attention of timm and of transformers, with
separate projections too, gives all of them the shape that one attribute says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nss_prune.graph.neurons import Member, NeuronGroup, Side, covering
from nss_prune.structures.attention import WIDTHS, Heads, Source, find_heads
from nss_prune.structures.protocol import Change, Rescaling

WIDTH = ("head_dim", "dim_head", "attn_head_dim", "attention_head_size", "head_size", "d_head")
SCALE = ("scale", "scaling", "softmax_scale")


@dataclass(frozen=True)
class Part:
    """The queries, keys or values of all heads, among the outputs of a layer.

    Attributes:
        name: Path of the layer in the attention module.
        channels: Of each head, ``[heads, width]``.
    """

    name: str
    channels: Tensor


@dataclass(frozen=True)
class Dimensions:
    """Where the dimensions of all heads lie; every name is a path in the attention module.

    Attributes:
        queries, keys, values: The layers that make them.
        consumer: The layer that reads the heads, and its channels.
        width: Dimensions of a head.
    """

    queries: Part
    keys: Part
    values: Part
    consumer: Part
    width: int


class HeadDimensions:
    """Dimensions of the heads of attention of any class; one number of them for all its heads.

    It claims nothing by itself: dimensions go together with the heads of
    :class:`nss_prune.structures.attention.Attention`.
    """

    def groups(self, name: str, module: nn.Module) -> tuple[NeuronGroup, ...]:
        """One group, named after the attention module, or ()."""
        found = find_dimensions(module)
        if isinstance(found, str):
            return ()
        prefix = f"{name}." if name else ""
        widths: dict[str, int] = {}
        for part in (found.queries, found.keys, found.values):
            widths[part.name] = widths.get(part.name, 0) + part.channels.numel()
        sides: list[tuple[str, Side, int]] = [(path, "out", n) for path, n in widths.items()]
        sides.append((found.consumer.name, "in", found.consumer.channels.numel()))
        members = tuple(
            covering(prefix + path, side, torch.arange(channels) % found.width)
            for path, side, channels in sides
        )
        queries = _queries(prefix, found, members[0].width)
        return (NeuronGroup(name, found.width, members, queries=queries),)

    def changes(self, module: nn.Module, group: NeuronGroup, kept: Tensor) -> Iterator[Change]:
        """The width of a head and of all of them, the scale, and √(r/d) in the queries' weights."""
        found = find_dimensions(module)
        heads = find_heads(module)
        assert heads is not None
        assert not isinstance(found, str)
        share = int(kept.sum()) / len(kept)
        if share == 1:
            return
        whole = {heads.queries * found.width}
        for name, value in vars(module).items():
            if type(value) is int and (
                (name in WIDTH and value == found.width) or (name in WIDTHS and value in whole)
            ):
                yield Rescaling(module, name, share)
            elif name in SCALE and type(value) is float:
                yield Rescaling(module, name, share**-0.5)
        layer = module.get_submodule(found.queries.name)
        parts = len(heads.sources[0].parts)
        for name, _ in layer.named_parameters(recurse=False):
            yield Rescaling(layer, name, math.sqrt(share), parts)


HEAD_DIMENSIONS = HeadDimensions()


def find_dimensions(module: nn.Module) -> Dimensions | str:
    """Where the dimensions of a module's heads lie, or why they must stay."""
    heads = find_heads(module)
    if heads is None:
        return "it is not attention whose heads are known"
    if reason := _reason_to_leave(module, heads):
        return reason
    queries, keys, values = (part for source in heads.sources for part in _parts(source))
    width = heads.key_width
    read = torch.arange(heads.consumer.width).view(heads.queries, width)
    return Dimensions(queries, keys, values, Part(heads.consumer.name, read), width)


def head_widths(model: nn.Module) -> dict[str, int]:
    """Attention module -> dimensions of each of its heads, where these can be found."""
    found = ((name, find_dimensions(module)) for name, module in model.named_modules())
    return {name: one.width for name, one in found if not isinstance(one, str)}


def _reason_to_leave(module: nn.Module, heads: Heads) -> str | None:
    """Why the dimensions of heads must stay, or None."""
    if heads.queries != heads.keys:
        return "query heads share their keys and values"
    if heads.key_width != heads.value_width:
        return "keys are not as wide as values"
    if heads.key_width < 2:
        return "a head has a single dimension"
    if sum(len(source.parts) for source in heads.sources) != 3:
        return "a gate goes with the values"
    norms = [*heads.norms, *heads.consumer.norms]
    norms += [name for source in heads.sources for name in source.projection.norms]
    between = [*norms, *_norms_of_a_head(heads)]
    if between:
        return f"{', '.join(between)} works on single dimensions"
    paths = [source.projection.name for source in heads.sources] + [heads.consumer.name]
    layers = [module.get_submodule(path) for path in paths]
    if not all(type(layer) is nn.Linear for layer in layers):
        return "its projections are not nn.Linear"
    if any(getattr(module, name, None) is not None for name in heads.biases):
        return "its biases are apart from its projections"
    return None


def _norms_of_a_head(heads: Heads) -> list[str]:
    """Norms inside, with parameters, that are as wide as a head; what else is there is tried."""
    return [
        path
        for path, part in heads.others.items()
        if any(
            value is not None and value.shape == (heads.key_width,)
            for value in part._parameters.values()
        )
    ]


def _parts(source: Source) -> Iterator[Part]:
    """The parts of a source, one after the other, each with all heads."""
    start = 0
    for width in source.parts:
        stop = start + source.heads * width
        channels = torch.arange(start, stop).view(source.heads, width)
        yield Part(source.projection.name, channels)
        start = stop


def _queries(prefix: str, found: Dimensions, channels: int) -> Member:
    by_head = found.queries.channels
    neurons = torch.arange(found.width).expand_as(by_head)
    return Member(
        prefix + found.queries.name, "out", by_head.flatten(), neurons.flatten(), channels
    )
