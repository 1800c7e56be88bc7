"""Which consumers can be folded into."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from nss_prune.compensation.constant import as_weight, by_channel_group, constant_map, response
from nss_prune.core.hooks import attached
from nss_prune.core.models import Forward, run
from nss_prune.core.nested import tensors_in
from nss_prune.core.text import first_line
from nss_prune.statistics.moments import ConsumerStatistics

PLAIN = frozenset({
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
})  # fmt: skip
"""Types that mix channels, without a subclass's forward or a parametrization."""


def reason_to_leave(
    module: nn.Module, statistics: ConsumerStatistics | None, shared: Collection[int]
) -> str:
    """Why a consumer cannot be folded into, or ""."""
    if statistics is None:
        return "there are no statistics of it"
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return f"it is a {type(module).__name__}"
    if id(module.weight) in shared:
        return "its weight is used elsewhere too"
    return _more_than_mixing(module, statistics.shape)


def shared_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that several modules hold, or one under several names."""
    counts = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {parameter for parameter, count in counts.items() if count > 1}


def used_elsewhere(model: nn.Module, inputs: Any, forward: Forward) -> set[int]:
    """Ids of the parameters that a call uses outside of the modules that hold them."""
    holders: dict[int, nn.Module] = {
        id(parameter): module
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    }
    watched = _Uses(holders)
    hooks: list[tuple[Any, Any]] = []
    for module in model.modules():
        hooks.append((module.register_forward_pre_hook, watched.enter))
        leaving = functools.partial(module.register_forward_hook, always_call=True)
        hooks.append((leaving, watched.leave))
    with attached(*hooks), watched:
        run(model, inputs, 0, forward)
    return watched.elsewhere


class _Uses(TorchFunctionMode):
    """Finds the parameters that are used while the module that holds them is not called.

    Attributes:
        elsewhere: Their ids.
    """

    def __init__(self, holders: dict[int, nn.Module]) -> None:
        super().__init__()
        self.elsewhere: set[int] = set()
        self._holders = holders
        self._inside: list[nn.Module] = []

    def enter(self, module: nn.Module, *_: Any) -> None:
        """Before a call."""
        self._inside.append(module)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """After it."""
        self._inside.remove(module)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if tensors_in(result):  # asking for its shape is no use
            for tensor in tensors_in((args, kwargs or {})):
                holder = self._holders.get(id(tensor))
                if holder is not None and holder not in self._inside:
                    self.elsewhere.add(id(tensor))
        return result


def _more_than_mixing(module: nn.Module, shape: Sequence[int]) -> str:
    """Why scaling the weight's input channels is not the same as scaling the inputs, or "".

    It is not where a subclass standardizes its weight, for example.
    """
    if type(module) in PLAIN and not {"forward", "_conv_forward"} & vars(module).keys():
        return ""
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
    except Exception as error:  # a forward of its own that needs more than this
        return f"its type {type(module).__name__} does not run alone: {first_line(error)}"
    if torch.allclose(inside, outside, rtol=1e-9, atol=1e-9 * float(outside.abs().max())):
        return ""
    return f"its type {type(module).__name__} does more with its weight than mix channels"


def _cropped(module: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a map that is large enough for the kernel, and no larger than must be."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return tuple(shape)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    sizes = (min(size, 2 * least + 8) for size, least in zip(shape[1:], reach, strict=True))
    return (shape[0], *sizes)
