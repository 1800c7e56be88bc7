"""A model that computes as if only its critical neurons were there, by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nss_prune.core.arguments import input_of, on_input, with_input
from nss_prune.core.models import clone, submodule
from nss_prune.core.multihead import heads_called
from nss_prune.graph.axes import input_axis
from nss_prune.graph.bases import BasisChange, in_basis
from nss_prune.graph.neurons import Member
from nss_prune.graph.norms import norm_axis, norm_of


@contextlib.contextmanager
def channels_masked(
    model: nn.Module,
    removed: Iterable[tuple[Member, Tensor]],
    queries: Iterable[tuple[Member, Tensor]] = (),
    bases: Sequence[BasisChange] = (),
) -> Iterator[None]:
    """Within the context, a model computes as if some of its channels were gone.

    What reads a removed channel reads zero, and a norm over channels sees the others only.

    Args:
        removed: Sides of modules, each with its channels that are gone, ``[removed]``.
        queries: Where queries are made that lose dimensions, and the channels of these.
        bases: The coordinates in which channels are gone; the model has other weights meanwhile.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(in_basis(model, bases))
        for member, channels in queries:
            layer = submodule(model, member.name)
            stack.callback(zero_outputs(layer, channels).remove)
        stack.enter_context(heads_called(model))
        for member, channels in removed:
            norm = norm_of(member, model)
            if norm is not None:
                stack.callback(normalize_without(norm, member.width, channels).remove)
            elif member.side == "in" and member.axis is None:
                consumer = submodule(model, member.name)
                stack.callback(zero_inputs(consumer, channels).remove)
            elif member.side == "in" and member.axis is not None:
                stack.enter_context(zero_columns(model, member.name, member.axis, channels))
        yield


def zero_inputs(consumer: nn.Module, channels: Tensor) -> RemovableHandle:
    """Let a layer see zeros in some channels of its input."""

    def zeroed(module: nn.Module, inputs: Tensor) -> Tensor:
        axis = input_axis(module)
        width = inputs.shape[axis]
        shape = [1] * inputs.dim()
        shape[axis] = width
        mask = torch.ones(width, dtype=torch.bool, device=inputs.device)
        mask[channels.to(inputs.device)] = False
        # Not a product: a removed neuron that is infinite or NaN must vanish too.
        return torch.where(mask.view(shape), inputs, inputs.new_zeros(()))

    return on_input(consumer, zeroed)


def zero_outputs(layer: nn.Module, channels: Tensor) -> RemovableHandle:
    """Let a layer that makes its channels last give zeros in some of them."""

    def zeroed(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.index_fill(-1, channels.to(output.device), 0)

    return layer.register_forward_hook(zeroed)


@contextlib.contextmanager
def zero_columns(model: nn.Module, name: str, axis: int, channels: Tensor) -> Iterator[None]:
    """Within the context, a bare parameter that reads channels along an axis reads zeros there."""
    layer, _, key = name.rpartition(".")
    module = submodule(model, layer)
    whole = module._parameters[key]
    assert whole is not None
    zeroed = whole.detach().index_fill(axis, channels.to(whole.device), 0)
    try:
        setattr(module, key, nn.Parameter(zeroed, whole.requires_grad))
        yield
    finally:
        setattr(module, key, whole)


def normalize_without(norm: nn.Module, width: int, channels: Tensor) -> RemovableHandle:
    """Let a norm over ``width`` channels see all but some of them, and give zeros for those."""
    kept = torch.ones(width, dtype=torch.bool)
    kept[channels] = False
    positions = kept.nonzero().flatten()

    def normalize(
        module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
    ) -> Tensor:
        inputs = input_of(arguments, keywords)
        small = norm_over(norm, positions)
        where = positions.to(output.device)
        axis = norm_axis(norm, width, inputs.shape)
        selected, others = with_input(arguments, keywords, inputs.index_select(axis, where))
        return torch.zeros_like(output).index_copy(axis, where, small(*selected, **others))

    return norm.register_forward_hook(normalize, with_kwargs=True)


def norm_over(norm: nn.Module, positions: Tensor) -> nn.Module:
    """A copy of a norm that has some of its channels alone."""
    small = clone(norm, lambda tensor: tensor.detach()[positions.to(tensor.device)])
    if isinstance(small, nn.GroupNorm):
        small.num_channels = len(positions)
    elif hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(positions),)  # type: ignore[assignment]
    return small
