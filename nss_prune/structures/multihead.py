"""``nn.MultiheadAttention``: a head is a neuron."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nss_prune.core.multihead import HeadwiseAttention, has_plain_heads
from nss_prune.graph.neurons import NeuronGroup, covering
from nss_prune.graph.slices import Slice
from nss_prune.structures.protocol import Change

FUSED = ("in_proj_weight", "in_proj_bias")  # queries, keys and values one after another
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


WIDTHS = {
    "in_proj_weight": ("embed_dim", "kdim", "vdim"),
    "q_proj_weight": ("embed_dim",), "k_proj_weight": ("kdim",), "v_proj_weight": ("vdim",),
}  # fmt: skip
"""Parameter -> the attributes that say how many columns it has."""


def narrowed(model: nn.Module, critical: Slice) -> Iterator[Change]:
    """What follows where what is given to torch's attention loses channels, and not its heads.

    Its own forward function asserts that both are as wide, so that it becomes a
    :class:`nss_prune.core.multihead.HeadwiseAttention`, as where heads go.
    """
    for member, channels in critical.removed_channels().values():
        path, _, key = member.name.rpartition(".")
        if member.axis != 1 or key not in WIDTHS:
            continue
        module = model.get_submodule(path)
        if has_plain_heads(module):
            left = member.width - len(channels)
            for name in WIDTHS[key]:
                yield Change(module, name, left)
            yield from _headwise(module)
            for whole in _around(model, path):
                yield Change(whole, "d_model", left)


def _around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The nn.Transformer that a module lies in, which asserts the width of what it is given."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if isinstance(module, nn.Transformer):
            yield module


class TorchAttention:
    """torch's own attention, on its own or in ``nn.TransformerEncoderLayer`` and its relatives.

    The projections are parameters and no layers, and the forward function ties the number of heads
    to the width of the input. A module that loses heads therefore becomes a
    :class:`nss_prune.core.multihead.HeadwiseAttention`, which is one of torch's with another
    forward function. Not claimed are modules with keys and values that come from no token
    (``add_bias_kv``, ``add_zero_attn``), and subclasses, whose forward function is not known.
    """

    def groups(self, name: str, module: nn.Module) -> tuple[NeuronGroup, ...]:
        """One group, named after ``out_proj``, or ()."""
        if not isinstance(module, nn.MultiheadAttention) or not has_plain_heads(module):
            return ()
        if module.num_heads < 2:
            return ()
        prefix = f"{name}." if name else ""
        heads = torch.arange(module.num_heads).repeat_interleave(module.head_dim)
        made = {key: heads.repeat(3) for key in FUSED} | dict.fromkeys(SEPARATE, heads)
        members = [
            covering(prefix + key, "out", neurons, 0)
            for key, neurons in made.items()
            if module._parameters.get(key) is not None
        ]
        consumer = f"{prefix}out_proj"
        members.append(covering(consumer, "in", heads))
        return (NeuronGroup(consumer, module.num_heads, tuple(members)),)

    def changes(self, module: nn.Module, group: NeuronGroup, kept: Tensor) -> Iterator[Change]:
        """The number of heads, and a forward function that takes any."""
        yield Change(module, "num_heads", int(kept.sum()))
        yield from _headwise(module)


def _headwise(module: nn.Module) -> Iterator[Change]:
    yield Change(module, "__class__", HeadwiseAttention)
    # It keeps encoder layers from the kernel that asserts what torch's own forward does.
    yield Change(module, "_qkv_same_embed_dim", False)
