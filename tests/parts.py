"""What random networks are made of, and the multiply-accumulates of a call counted by hand."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 4


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.body(inputs)


class Concat(nn.Module):
    """Branches side by side; on the axis of the channels."""

    def __init__(self, branches: list[nn.Module], axis: int) -> None:
        super().__init__()
        self.branches, self.axis = nn.ModuleList(branches), axis

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([branch(inputs) for branch in self.branches], dim=self.axis)


class Gated(nn.Module):
    """One half of the channels is multiplied by the sigmoid of the other."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, inputs: Tensor) -> Tensor:
        values, gates = self.layer(inputs).chunk(2, dim=self.axis)
        return values * torch.sigmoid(gates)


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        pooled = inputs.mean((2, 3), keepdim=True)
        return inputs * torch.sigmoid(self.up(torch.relu(self.down(pooled))))


class Shuffled(nn.Module):
    """Channels of two groups in turn, as ShuffleNet mixes them."""

    def forward(self, inputs: Tensor) -> Tensor:
        samples, channels, height, width = inputs.shape
        pairs = inputs.view(samples, 2, channels // 2, height, width)
        return pairs.transpose(1, 2).reshape(samples, channels, height, width)


class HandWritten(nn.Module):
    """A norm with a parameter of its own class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        scale = inputs.pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
        return inputs * scale * self.weight


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, width // heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        samples, tokens, _ = inputs.shape
        parts = self.qkv(inputs).reshape(samples, tokens, 3, self.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        else:
            scores = torch.einsum("bhid,bhjd->bhij", query * self.head_dim**-0.5, key)
            mixed = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)
        return self.proj(mixed.transpose(1, 2).reshape(samples, tokens, -1))


class Recurrent(nn.Module):
    def __init__(self, kind: type, width: int, hidden: int, layers: int, both: bool) -> None:
        super().__init__()
        self.layer = kind(width, hidden, layers, batch_first=True, bidirectional=both)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)[0]


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(inputs)))


class Branching(nn.Module):
    """Takes another way by the values that it sees."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        made = self.layer(inputs)
        return made if bool(inputs.sum() > -1e9) else made * 2


class Mean(nn.Module):
    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.axes)


class Outputs(nn.Module):
    """Several inputs, added or one the gate of the other, and several outputs."""

    def __init__(self, body: nn.Module, width: int, heads: int, gates: bool, named: bool) -> None:
        super().__init__()
        self.body, self.gates, self.named = body, gates, named
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(heads))

    def forward(self, *inputs: Tensor) -> Any:
        first, *others = inputs
        for other in others:
            first = first * torch.sigmoid(other) if self.gates else first + other
        features = self.body(first)
        found = [head(features) for head in self.heads]
        if self.named:
            return {f"head {number}": output for number, output in enumerate(found)}
        return found[0] if len(found) == 1 else tuple(found)


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs, need_weights=False)[0]


class GroupedQueries(nn.Module):
    """Attention in which several heads of queries share keys and values."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.kv_heads = heads // shared
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width // shared)
        self.value = nn.Linear(width, width // shared)
        self.proj = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        samples, tokens, _ = inputs.shape
        query, key, value = (
            layer(inputs).view(samples, tokens, heads, -1).transpose(1, 2)
            for layer, heads in (
                (self.query, self.num_heads), (self.key, self.kv_heads), (self.value, self.kv_heads)
            )
        )  # fmt: skip
        repeats = self.num_heads // self.kv_heads
        key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
        mixed = (query @ key.mT * self.head_dim**-0.5).softmax(-1) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))


class GatedUnits(nn.Module):
    """SwiGLU of three layers."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(inputs)) * self.up(inputs))


class Einsum(nn.Module):
    """A linear layer without a layer."""

    def __init__(self, width: int, after: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(after, width) / width**0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", inputs, self.matrix)


class Tied(nn.Module):
    """A layer whose weight is used once more, transposed, by a function."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, inner)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(torch.relu(self.layer(inputs)), self.layer.weight.t())


class OneWeight(nn.Module):
    """Two layers with one weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(inputs)))


class InPlace(nn.Module):
    """Operations that write to what a layer made."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        made = self.layer(inputs)
        made.mul_(0.5).add_(0.1)
        if made.shape == inputs.shape:
            made += inputs
        return functional.leaky_relu_(made, 0.2) * 2  # the next may write to what is given on


class Swapped(nn.Module):
    """Unequal parts of the channels, the second one first."""

    def __init__(self, layer: nn.Module, sizes: tuple[int, int], axis: int) -> None:
        super().__init__()
        self.layer, self.sizes, self.axis = layer, sizes, axis

    def forward(self, inputs: Tensor) -> Tensor:
        first, second = self.layer(inputs).split(self.sizes, dim=self.axis)
        return torch.cat([torch.tanh(second), first], self.axis)


class Unit(nn.Module):
    """Each sample's channels have length one at each position."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.normalize(inputs, dim=self.axis)


class ChannelNorm(nn.Module):
    """The LayerNorm over channels of a map, by hand, as ConvNeXt has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.rand(width) + 0.5),
            nn.Parameter(torch.randn(width)),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        centred = inputs - inputs.mean(1, keepdim=True)
        normed = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * normed + self.bias[:, None, None]


class ChannelsLast(nn.Module):
    """A body for which the channels are the last axis."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class AsTokens(nn.Module):
    """A body for which the positions of a map are tokens."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.body(inputs.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(inputs.shape)


def macs_by_hand(model: nn.Module, inputs: Any) -> int:
    """Multiply-accumulates of the products in one call, by the formula of each module."""
    found = 0

    def called(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal found
        found += _macs(module, arguments[0], output)

    hooks = [module.register_forward_hook(called) for module in model.modules()]
    try:
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@functools.singledispatch
def _macs(module: nn.Module, inputs: Tensor, output: Any) -> int:
    return 0


@_macs.register
def _(module: nn.Linear, inputs: Tensor, output: Tensor) -> int:
    return output.numel() * module.weight.shape[1]


@_macs.register
def _(module: nn.modules.conv._ConvNd, inputs: Tensor, output: Tensor) -> int:
    places = inputs if module.transposed else output
    return places.numel() * math.prod(module.weight.shape[1:])


@_macs.register
def _(module: nn.RNNBase, inputs: Tensor, output: Any) -> int:
    steps = inputs.shape[0] * inputs.shape[1]
    return steps * sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)


@_macs.register
def _(module: nn.MultiheadAttention, inputs: Tensor, output: Any) -> int:
    samples, tokens, width = inputs.shape
    if module.in_proj_weight is not None:
        queries = keys = values = len(module.in_proj_weight) // 3
    else:
        parts = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        queries, keys, values = map(len, parts)
    projected = tokens * width * (queries + keys + values)
    mixed = tokens * tokens * (queries + values)
    # torch's own gives the weight of out_proj to a function.
    last = tokens * values * width if type(module) is nn.MultiheadAttention else 0
    return samples * (projected + mixed + last)


@_macs.register
def _(module: Attention, inputs: Tensor, output: Tensor) -> int:
    samples, tokens, _ = inputs.shape
    values = module.proj.in_features
    queries = (module.qkv.out_features - values) // 2
    # A sum over heads of one dimension is none: einsum multiplies entry by entry.
    plain = not module.fused and queries == module.num_heads
    return samples * tokens * tokens * (values if plain else queries + values)


@_macs.register
def _(module: GroupedQueries, inputs: Tensor, output: Tensor) -> int:
    samples, tokens, _ = inputs.shape
    return samples * tokens * tokens * (module.query.out_features + module.proj.in_features)


@_macs.register
def _(module: Einsum, inputs: Tensor, output: Tensor) -> int:
    return inputs.numel() * len(module.matrix) if inputs.shape[-1] > 1 else 0


@_macs.register
def _(module: Tied, inputs: Tensor, output: Tensor) -> int:
    return output.numel() * len(module.layer.weight)
