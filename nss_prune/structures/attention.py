"""Attention: a head is a neuron.

Attention is a module that says how many heads it has, with projections that make queries, keys
and values, and one that reads what the heads give. What a head gives depends on nothing that
another head has, so zeroing it for the consumer is the same as removing it.

Where heads share keys and values (Ainslie et al., 2023, "GQA"), a neuron is a key head with its
query heads; where all share a single one (Shazeer, 2019), each query head is a neuron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nss_prune.graph.neurons import Member, NeuronGroup, Side, covering
from nss_prune.structures.protocol import Change

FUSED = ("qkv", "qkv_proj", "to_qkv", "in_proj", "query_key_value", "c_attn")
QUERY_KEY = ("qk", "qk_proj", "to_qk")
KEY_VALUE = ("kv", "kv_proj", "to_kv")
QUERY = ("q", "q_proj", "to_q", "wq", "query", "query_proj", "q_lin")
KEY = ("k", "k_proj", "to_k", "wk", "key", "key_proj", "k_lin")
VALUE = ("v", "v_proj", "to_v", "wv", "value", "value_proj", "v_lin")
GATE = ("gate", "gate_proj", "g_proj")
OUTPUT = (
    "proj", "out_proj", "o_proj", "to_out", "wo", "output", "dense", "out_lin", "projection",
    "c_proj",
)  # fmt: skip
HEADS = ("num_heads", "heads", "n_heads", "n_head", "num_attention_heads")
KEY_HEADS = ("num_kv_heads", "num_key_value_heads", "n_kv_heads")
SHARERS = ("num_kv_groups", "num_key_value_groups")  # query heads of each key head
WIDTHS = (  # of all heads together, where the attribute equals it
    "all_head_dim", "all_head_size", "attention_dim", "attn_dim", "dim_attn", "dim_out",
    "embed_dim", "hidden_dim", "inner_dim", "key_attn_dim", "kv_dim", "out_dim", "val_attn_dim",
    "split_size",
)  # fmt: skip

TABLE = "relative_position_bias_table"  # [positions, heads] or [heads, positions, positions]
PER_HEAD = (  # with an axis of heads, also where it could be one of channels
    "attention_biases", "gating_param", "logit_scale", "temperature", TABLE,
)  # fmt: skip

SHAPE = "bias_shape"  # of what is added to the attention, heads first or last


@dataclass(frozen=True)
class Projection:
    """A linear layer, alone or in a small container.

    Attributes:
        name: Path of the layer in the attention module.
        width: Channels on the side of the heads.
        child: Path of the part of the attention module that it is, or lies in.
        norms: Paths of the norms between the layer and the heads.
    """

    name: str
    width: int
    child: str
    norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A projection that makes parts (queries, keys, values) of some heads.

    Attributes:
        parts: Channels of one head in each part.
        heads: Number of heads.
    """

    projection: Projection
    parts: tuple[int, ...]
    heads: int

    def head_of_channel(self, head_first: bool = False) -> Tensor:
        """The head of each channel of the layer, ``[channels]``."""
        heads = torch.arange(self.heads)
        if head_first:
            return heads.repeat_interleave(sum(self.parts))
        return torch.cat([heads.repeat_interleave(part) for part in self.parts])


@dataclass(frozen=True)
class Heads:
    """What was found in an attention module.

    Attributes:
        queries: Number of query heads.
        keys: Number of key heads.
        key_width: Channels of a head's query and key.
        value_width: Channels of a head's value.
        sources: The projections that make the heads.
        consumer: The projection that reads them.
        norms: Paths of the norms over all heads, before the consumer.
        others: Path -> any other module inside; the attention module itself is "".
        core: Path of the part that makes the heads: "", or a child beside that of the consumer.
    """

    queries: int
    keys: int
    key_width: int
    value_width: int
    sources: tuple[Source, ...]
    consumer: Projection
    norms: tuple[str, ...]
    others: Mapping[str, nn.Module]
    core: str = ""

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return self.queries if self.keys == 1 else self.keys

    @property
    def going(self) -> tuple[Source, ...]:
        """The sources that have a part of each neuron: not those of a single, shared key head."""
        return tuple(source for source in self.sources if source.heads > 1)

    @property
    def biases(self) -> dict[str, Source]:
        """Biases that a fused projection keeps apart, as if projections made them."""
        apart = Projection("", 0, "")
        return {
            "q_bias": Source(apart, (self.key_width,), self.queries),
            "k_bias": Source(apart, (self.key_width,), self.keys),
            "v_bias": Source(apart, (self.value_width,), self.keys),
        }

    def neurons_of(self, source: Source, head_first: bool = False) -> Tensor:
        """The neuron of each channel of a source, ``[channels]``."""
        return source.head_of_channel(head_first) // (source.heads // self.neurons)

    def neuron_of_query(self, width: int) -> Tensor:
        """The neuron of each channel of all query heads, each ``width`` wide, ``[channels]``."""
        heads = torch.arange(self.queries).repeat_interleave(width)
        return heads // (self.queries // self.neurons)

    def widths(self, queries: int, keys: int) -> dict[int, int]:
        """Width of all heads together -> width with as many heads as given."""
        return {
            self.keys * self.key_width: keys * self.key_width,
            self.keys * self.value_width: keys * self.value_width,
            self.queries * self.key_width: queries * self.key_width,
            self.queries * self.value_width: queries * self.value_width,
        }


class Attention:
    """Attention of any class, its projections fused or not.

    Not claimed are single heads, heads that a layer mixes, and ``nn.MultiheadAttention``: its
    forward function ties the number of heads to the width of its input.

    Args:
        head_first: Whether the channels of a fused projection come by head and then by part, and
            not by part and then by head. A module with an attribute ``head_first`` says so
            itself; one with ``key_dim`` has its heads first.
    """

    def __init__(self, head_first: bool = False) -> None:
        self.head_first = head_first

    def groups(self, name: str, module: nn.Module) -> tuple[NeuronGroup, ...]:
        """One group, named after the first projection, or ()."""
        heads = find_heads(module)
        if heads is None or not self._orders(module, heads):
            return ()
        prefix = f"{name}." if name else ""
        root = prefix + heads.going[0].projection.name
        members = tuple(self._members(heads, prefix))
        return (NeuronGroup(root, heads.neurons, members),)

    def changes(self, module: nn.Module, group: NeuronGroup, kept: Tensor) -> Iterator[Change]:
        """Numbers of heads and widths of all heads together, buffers by head, emptied caches.

        The width of a head and its scale stay.
        """
        heads = find_heads(module)
        assert heads is not None
        left = int(kept.sum())
        queries = left * heads.queries // heads.neurons
        keys = left if heads.keys > 1 else 1
        for part in heads.others.values():
            yield from _new_numbers(part, heads, queries, keys)
            for name, buffer, neurons, axis in _along_heads(part, part._buffers, heads):
                stays = kept[neurons].nonzero().flatten().to(buffer.device)
                yield Change(part, name, buffer.index_select(axis, stays))

    def _orders(self, module: nn.Module, heads: Heads) -> bool:
        """Whether this adapter's order of channels is one that the module may have."""
        if all(len(source.parts) == 1 for source in heads.going):
            return not self.head_first  # both are the same
        known = getattr(module, "head_first", None)
        if not isinstance(known, bool):
            return self.head_first or not isinstance(getattr(module, "key_dim", None), int)
        return known == self.head_first

    def _members(self, heads: Heads, prefix: str) -> Iterator[Member]:
        for source in heads.going:
            neurons = heads.neurons_of(source, self.head_first)
            yield covering(prefix + source.projection.name, "out", neurons)
            for name in source.projection.norms:
                yield covering(prefix + name, "both", neurons)
        read = heads.neuron_of_query(heads.value_width)
        for name in (*heads.norms, *heads.consumer.norms):
            yield covering(prefix + name, "both", read)
        yield covering(prefix + heads.consumer.name, "in", read)
        for name, part in heads.others.items():
            if isinstance(part, nn.Linear) and part.out_features == heads.queries:
                yield covering(prefix + name, "out", heads.neuron_of_query(1))
            for key, _, neurons, axis in _along_heads(part, part._parameters, heads):
                path = f"{name}.{key}" if name else key
                yield covering(prefix + path, "out", neurons, axis)


def find_heads(module: nn.Module) -> Heads | None:
    """The heads of a module; None where it is not attention, or its heads cannot go one by one."""
    core = _core(module)
    queries = _number_of_heads(module.get_submodule(core))
    if queries is None or queries < 2:
        return None
    consumer = _projection(module, OUTPUT, "in")
    if consumer is None or consumer.width % queries:
        return None
    width = consumer.width // queries
    sources = _fused(module, queries, width) or _separate(module, queries, width)
    keys = sources[-1].heads if sources else 0
    if not keys or queries % keys:
        return None
    if any(source.heads * sum(source.parts) != source.projection.width for source in sources):
        return None
    norms = _norms_between(module, sources, consumer)
    gate = _projection(module, GATE, "out")
    if gate is not None and gate.width == consumer.width:
        sources = (sources[0], Source(gate, (width,), queries), *sources[1:])
    children = {source.projection.child for source in sources} | {consumer.child}
    others = {
        path: part
        for path, part in module.named_modules()
        if not any(path == child or path.startswith(f"{child}.") for child in children)
    }
    if any(_mixes(part, queries) for part in others.values()):
        return None
    key_width = sources[0].parts[0]
    return Heads(queries, keys, key_width, width, sources, consumer, norms, others, core)


def _core(module: nn.Module) -> str:
    """The only child that has a number of heads and no consumer, as BERT's, or "".

    The consumer is then in a child beside it.
    """
    if _number_of_heads(module) is not None:
        return ""
    found = [
        name
        for name, child in module.named_children()
        if _number_of_heads(child) is not None and _projection(child, OUTPUT, "in") is None
    ]
    return found[0] if len(found) == 1 else ""


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> child; those of a child that makes the heads in its place."""
    parts: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        inside = {f"{name}.{path}": part for path, part in child.named_children()}
        makes_heads = says_heads(child) and not says_heads(module)
        parts.update(inside if makes_heads and inside else {name: child})
    return parts


def says_heads(module: nn.Module) -> bool:
    """Whether a module has an attribute that is known to be its number of heads."""
    return any(_number(module, name) is not None for name in HEADS)


def _number_of_heads(module: nn.Module) -> int | None:
    """What an attribute says, or the width of the queries by that of a head."""
    said = [number for name in HEADS if (number := _number(module, name)) is not None]
    if said:
        return said[0]
    width = _number(module, "head_dim")
    query = None if width is None else _projection(module, QUERY, "out")
    return None if width is None or query is None else query.width // width


def _number(module: nn.Module, name: str) -> int | None:
    """An attribute that is an integer."""
    known = name in vars(module) or hasattr(type(module), name)
    if not known and type(module).__getattr__ is nn.Module.__getattr__:  # slow where there is none
        return None
    value = getattr(module, name, None)
    return value if type(value) is int else None


def _fused(module: nn.Module, queries: int, value: int) -> tuple[Source, ...]:
    """The one projection that makes everything; none if there is none, or it is too narrow."""
    fused = _projection(module, FUSED, "out")
    if fused is None:
        return ()
    key = (fused.width // queries - value) // 2
    return (Source(fused, (key, key, value), queries),) if key > 0 else ()


def _separate(module: nn.Module, queries: int, value: int) -> tuple[Source, ...]:
    """Projections apart: the first makes the queries, the last the values."""
    both, values = (_projection(module, names, "out") for names in (QUERY_KEY, VALUE))
    if both is not None and values is not None:
        key = both.width // queries // 2
        return Source(both, (key, key), queries), Source(values, (value,), queries)
    query, key_value, keys = (
        _projection(module, names, "out") for names in (QUERY, KEY_VALUE, KEY)
    )
    key = 0 if query is None else query.width // queries
    if query is None or key == 0:
        return ()
    first = Source(query, (key,), queries)
    if key_value is not None:
        return first, Source(key_value, (key, value), key_value.width // (key + value))
    if keys is not None and values is not None:
        shared = keys.width // key
        return first, Source(keys, (key,), shared), Source(values, (value,), shared)
    return ()


def _projection(module: nn.Module, names: Sequence[str], side: Side) -> Projection | None:
    """The linear layer of the first child with one of the names that has a single one.

    Between it and the heads there may be norms over channels, and what has no parameters.
    """
    parts = _parts(module)
    paths = {path.rpartition(".")[2]: path for path in reversed(parts)}
    for child in [paths[name] for name in names if name in paths]:
        leaves = _leaves(child, parts[child])
        linear = [position for position, (_, leaf) in enumerate(leaves) if _width(leaf, side)]
        if len(linear) != 1:
            continue
        path, layer = leaves[linear[0]]
        width = _width(layer, side)
        between = leaves[linear[0] + 1 :] if side == "out" else leaves[: linear[0]]
        norms = [(path, leaf) for path, leaf in between if list(leaf.parameters())]
        if all(_is_norm_of(leaf, width) for _, leaf in norms):
            return Projection(path, width, child, tuple(path for path, _ in norms))
    return None


def _leaves(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{name}.{path}" if path else name, leaf)
        for path, leaf in module.named_modules()
        if next(leaf.children(), None) is None
    ]


def _width(layer: nn.Module, side: Side) -> int:
    """Channels on one side of a layer that reads all of its inputs for each output, else 0."""
    if isinstance(layer, nn.Linear):
        return layer.in_features if side == "in" else layer.out_features
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1 and not layer.transposed:
        return layer.in_channels if side == "in" else layer.out_channels
    return 0


def _is_norm_of(layer: nn.Module, width: int) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.num_features == width


def _mixes(layer: nn.Module, heads: int) -> bool:
    """Whether a layer makes heads out of all heads, as those of talking heads do."""
    return _width(layer, "in") == heads == _width(layer, "out")


def _norms_between(
    module: nn.Module, sources: Iterable[Source], consumer: Projection
) -> tuple[str, ...]:
    """LayerNorms as wide as all heads that come after the sources and before the consumer."""
    parts = _parts(module)
    children = list(parts)
    first = max(children.index(source.projection.child) for source in sources)
    return tuple(
        name
        for name in children[first : children.index(consumer.child)]
        if isinstance(norm := parts[name], nn.LayerNorm)
        if tuple(norm.normalized_shape) == (consumer.width,)
    )


def _along_heads(
    part: nn.Module, tensors: Mapping[str, Tensor | None], heads: Heads
) -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Bare tensors with an axis of heads: name, tensor, neurons along the axis, axis."""
    biases = heads.biases if part is heads.others[heads.core] else {}
    for name, tensor in tensors.items():
        if tensor is None or name in ("weight", "bias"):  # of layers and norms
            continue
        if name in biases:
            source = biases[name]
            if source.heads > 1 and tensor.shape == (source.heads * sum(source.parts),):
                yield name, tensor, heads.neurons_of(source), 0
        elif (axis := _axis_of_heads(name, tensor, heads)) is not None:
            yield name, tensor, heads.neuron_of_query(1), axis


def _axis_of_heads(name: str, tensor: Tensor, heads: Heads) -> int | None:
    """The axis as long as there are heads, unless it may as well be another one."""
    axes = [axis for axis, length in enumerate(tensor.shape) if length == heads.queries]
    if not axes:
        return None
    if name in PER_HEAD:
        return axes[-1] if name == TABLE and tensor.dim() == 2 else axes[0]
    if not isinstance(tensor, nn.Parameter):  # positions are not to be taken for heads
        return axes[0] if tensor.numel() == heads.queries else None
    could_be_channels = heads.queries in (heads.key_width, heads.value_width)
    return None if could_be_channels else axes[0]


def _new_numbers(part: nn.Module, heads: Heads, queries: int, keys: int) -> Iterator[Change]:
    """Attributes of the attention module, or of one inside, that must follow the heads."""
    heads_left = {heads.queries: queries}
    keys_left = {heads.keys: keys}
    sharers_left = {heads.queries // heads.keys: queries // keys}
    widths_left = heads.widths(queries, keys) if part is heads.others[heads.core] else {}
    followers = {
        **dict.fromkeys(HEADS, heads_left),
        **dict.fromkeys(KEY_HEADS, keys_left),
        **dict.fromkeys(SHARERS, sharers_left),
        **dict.fromkeys(WIDTHS, widths_left),
    }
    for name, value in vars(part).items():
        if type(value) is int and value in followers.get(name, {}):
            yield Change(part, name, followers[name][value])
        elif name == SHAPE and heads.queries in value:
            at = len(value) - 1 if value[-1] == heads.queries else value.index(heads.queries)
            yield Change(part, name, (*value[:at], queries, *value[at + 1 :]))
        elif name.endswith("_cache") and isinstance(value, dict):
            yield Change(part, name, {})
