"""Norms whose result for one channel depends on the other channels."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nss_prune.core.models import clone, submodule
from nss_prune.graph.axes import side_width
from nss_prune.graph.neurons import Member, NeuronGroup

LEAST_CHANNELS = 2  # of what is normalized together: a single channel becomes a constant
KNOWN = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norm_of(member: Member, model: nn.Module) -> nn.Module | None:
    """The norm over channels that passes a member's neurons on, or None.

    It is one of torch's, or a module of a user's own with nothing but parameters as long as it has
    channels, which changes what it gives for a channel when another one changes.
    """
    if member.side == "in":
        return None
    name = member.name if member.axis is None else member.name.rpartition(".")[0]
    module = submodule(model, name)
    if isinstance(module, KNOWN):
        return module
    own = member.axis == 0 or (member.axis is None and side_width(module, "out", None) is None)
    return module if own and _is_own_norm(module, member.width) else None


def norm_axis(norm: nn.Module, width: int, shape: Sequence[int]) -> int:
    """The axis over which a norm normalizes inputs of a shape.

    That of a user's own, or of a subclass of LayerNorm, is the one as long as it has channels, or
    shows in whether it takes a map of another width.
    """
    if isinstance(norm, nn.GroupNorm):
        return 1
    if type(norm) in KNOWN or len(shape) < 3 or shape[1] != width:
        return -1
    if shape[-1] != width:
        return 1
    channels_first = (1, width, *[1] * (len(shape) - 3), width + 1)
    return -1 if _probed(norm, channels_first) is None else 1


def least_neurons(group: NeuronGroup, model: nn.Module) -> int:
    """How many neurons of a group must stay at least.

    More than one where a norm over them needs two channels in each of its groups.
    """
    least = 1
    for member in group.members:
        norm = norm_of(member, model)
        if norm is None:
            continue
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
        each = len(member.channels) / groups / group.size  # channels of a neuron in each group
        least = max(least, math.ceil(LEAST_CHANNELS / each))
    return min(least, group.size)


def _is_own_norm(module: nn.Module, width: int) -> bool:
    tensors = [value for value in module._parameters.values() if value is not None]
    if module._modules or any(value.shape != (width,) for value in tensors):
        return False
    return any(
        _mixes(module, shape) for shape in ((2, width), (1, width, 1, width + 1)) if width > 1
    )


def _mixes(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether channels, along the second axis, change when the first one does."""
    one, other = _probed(module, shape), _probed(module, shape, 1.0)
    if one is None or other is None:
        return False
    return not torch.allclose(one[:, 1:], other[:, 1:])


def _probed(module: nn.Module, shape: Sequence[int], added: float = 0.0) -> Tensor | None:
    """What a copy of a module makes of an input, in its shape; None where it takes none such."""
    probe = clone(module, lambda tensor: tensor.detach()).eval()
    weight = next(iter(module.parameters()), torch.empty(0))
    inputs = torch.linspace(-1.0, 1.0, math.prod(shape)).view(tuple(shape)).to(weight)
    inputs[:, 0] += added
    with contextlib.suppress(Exception), torch.no_grad():
        outputs = probe(inputs)
        if isinstance(outputs, Tensor) and outputs.shape == inputs.shape:
            return outputs
    return None
