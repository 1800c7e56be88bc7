"""Gated units: a neuron is a value with its gate.

A gated linear unit (Dauphin et al., 2017; Shazeer, 2020, "SwiGLU") makes values and gates in one
layer of twice the width, multiplies the halves, and a second layer reads the product. What follows
a model through its tensors cannot always tell which gate goes with which value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from nss_prune.graph.neurons import NeuronGroup, Side, covering
from nss_prune.structures.attention import says_heads
from nss_prune.structures.protocol import Change

MOST_LAYERS = 4  # two and some norms: larger modules are not walked through to their end


class GatedUnit:
    """A module of just two such layers: the second reads half as much as the first makes.

    Between them there may be norms over the product. Layers are linear, or convolutions of a
    single position. A module that says how many heads it has is attention, and no gated unit.
    """

    def groups(self, name: str, module: nn.Module) -> tuple[NeuronGroup, ...]:
        """One group, named after the first layer, or ()."""
        found = _pair(module)
        if found is None:
            return ()
        first, norms, second, size = found
        prefix = f"{name}." if name else ""
        neurons = torch.arange(size)
        members = (
            covering(prefix + first, "out", neurons.repeat(2)),
            *(covering(prefix + norm, "both", neurons) for norm in norms),
            covering(prefix + second, "in", neurons),
        )
        return (NeuronGroup(prefix + first, size, members, ties=2),)

    def changes(self, module: nn.Module, group: NeuronGroup, kept: Tensor) -> Iterable[Change]:
        """Nothing: the halves are as wide as the layer says."""
        return ()


def _pair(module: nn.Module) -> tuple[str, tuple[str, ...], str, int] | None:
    """First layer, norms, second layer, and the number of neurons."""
    if says_heads(module) or any(value is not None for value in module._parameters.values()):
        return None
    leaves = list(itertools.islice(_leaves_with_parameters(module), MOST_LAYERS + 1))
    if not 2 <= len(leaves) <= MOST_LAYERS:
        return None
    (first, maker), *between, (second, consumer) = leaves
    size = _channels(consumer, "in")
    if not size or _channels(maker, "out") != 2 * size:
        return None
    if not all(isinstance(norm, nn.LayerNorm) for _, norm in between):
        return None
    return first, tuple(name for name, _ in between), second, size


def _leaves_with_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if part is not module and any(value is not None for value in part._parameters.values()):
            yield name, part


def _channels(layer: nn.Module, side: Side) -> int:
    """Channels of a layer that looks at a single position, else 0."""
    if isinstance(layer, nn.Linear):
        return layer.in_features if side == "in" else layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1:
        return layer.in_channels if side == "in" else layer.out_channels
    return 0
