"""Which consumers can be folded into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import nn

from nss_prune.compensation.constant import as_weight, by_channel_group, constant_map, response
from nss_prune.statistics.moments import ConsumerStatistics


def reason_to_leave(
    module: nn.Module, statistics: ConsumerStatistics | None, shared: Collection[int]
) -> str:
    """Why a consumer cannot be folded into, or ""."""
    if statistics is None:
        return "there are no statistics of it"
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return f"it is a {type(module).__name__}"
    if id(module.weight) in shared:
        return "another layer has the same weight"
    if not _mixes_channels(module, statistics.shape):
        return f"its type {type(module).__name__} does more with its weight than mix channels"
    return ""


def shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules hold, or one under several names."""
    counts = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {parameter for parameter, count in counts.items() if count > 1}


def _mixes_channels(module: nn.Module, shape: Sequence[int]) -> bool:
    """Whether scaling the weight's input channels is the same as scaling the inputs.

    It is not where a subclass standardizes its weight, for example.
    """
    weight = by_channel_group(module, 1)
    generator = torch.Generator().manual_seed(0)
    groups, _, channels, _ = weight.shape
    factors = 0.5 + torch.rand(groups, channels, generator=generator, dtype=torch.float64)
    factors = factors.to(weight.device)
    scaled = as_weight(weight * factors[:, None, :, None], module)
    original = as_weight(weight, module)
    inputs = factors.flatten()
    small = _cropped(module, shape)
    try:
        inside = response(module, scaled, constant_map(module, small, torch.ones_like(inputs)))
        outside = response(module, original, constant_map(module, small, inputs))
    except Exception:  # a forward of its own that needs more than this
        return False
    return torch.allclose(inside, outside, rtol=1e-9, atol=1e-9 * float(outside.abs().max()))


def _cropped(module: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a map that is large enough for the kernel, and no larger than must be."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return tuple(shape)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    sizes = (min(size, 2 * least + 8) for size, least in zip(shape[1:], reach, strict=True))
    return (shape[0], *sizes)
