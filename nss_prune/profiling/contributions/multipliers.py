"""Functions whose backward pass multiplies by differences, the parts of the rescale rule.

Each takes the inputs and their references along one axis (:class:`Pairing`) and gives the
multipliers of the inputs, see :mod:`nss_prune.profiling.contributions.rescale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Pairing(NamedTuple):
    """How the first axis is divided: the inputs, then the reference of each, or one for all.

    Where the model folds other axes into the first (windows, tokens), each sample and each
    reference takes several rows.
    """

    samples: int
    references: int

    def given(self, values: Tensor) -> Tensor:
        """The rows of the inputs."""
        return values[: len(values) // sum(self) * self.samples]

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of the inputs, and those of the references, which broadcast to them."""
        given = self.given(values)
        reference = values[len(given) :]
        if len(reference) in (1, len(given)):
            return given, reference
        return given, reference.repeat(self.samples, *[1] * (values.dim() - 1))

    def returned(self, shares: Tensor, shape: torch.Size) -> Tensor:
        """A gradient of a shape with ``shares`` for the inputs, and none for the references."""
        return torch.cat([shares, shares.new_zeros(shape[0] - len(shares), *shape[1:])])


class Rescale(Function):
    """An elementwise function whose backward pass multiplies by Δout/Δin.

    Only the multiplier ``[samples, ...]`` is kept, a quarter of what input and output would
    take, and nothing of the input, which an in-place function overwrites.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        pairing: Pairing,
        function: Callable[[Tensor], Tensor],
        pointwise: bool = True,
    ) -> Tensor:
        """``pointwise``: the function is the same everywhere, so any selection can be put in."""
        given, reference = pairing.split(inputs)
        change = given - reference
        still = _much_smaller(change, given).nonzero(as_tuple=True)
        slope = derivative(function, given[still] if pointwise else given)
        outputs = function(inputs)
        if outputs is inputs:
            ctx.mark_dirty(inputs)
        given, reference = pairing.split(outputs)
        multiplier = (given - reference).div_(change)
        multiplier[still] = slope if pointwise else slope[still]
        ctx.save_for_backward(multiplier)
        ctx.pairing = pairing
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (multiplier,) = ctx.saved_tensors
        shares = ctx.pairing.given(gradient) * multiplier
        return ctx.pairing.returned(shares, gradient.shape), None, None, None


class MaxPool(Function):
    """Max pooling in which each window gives all of its Δout to one position.

    That position is where the larger of the two maxima lies: the maximum of the input if it is
    at least that of the reference, else the maximum of the reference. There |Δin| ≥ |Δout| with
    the same sign, so the multiplier Δout/Δin is in [0, 1], and as windows are treated one by one
    the contributions are complete however much they overlap. captum chooses the same positions,
    but where windows share one, lets the last of them win.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        pairing: Pairing,
        pool: Callable[[Tensor], tuple[Tensor, Tensor]],
        spatial: int,
    ) -> tuple[Tensor, Tensor]:
        outputs, indices = pool(inputs)
        top, reference_top = pairing.split(outputs)
        place = torch.where(top >= reference_top, *pairing.split(indices)).flatten(-spatial)
        given, reference = pairing.split(inputs.flatten(-spatial))
        change = given.gather(-1, place) - reference.expand_as(given).gather(-1, place)
        # Differences alone are divided, without rounding: only 0 / 0 needs the derivative.
        multiplier = (top - reference_top).flatten(-spatial).div_(change)
        multiplier.masked_fill_(change == 0, 1)
        ctx.save_for_backward(multiplier, place)
        ctx.shape, ctx.spatial, ctx.pairing = inputs.shape, spatial, pairing
        ctx.mark_non_differentiable(indices)
        return outputs, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        multiplier, place = ctx.saved_tensors
        shares = ctx.pairing.given(gradient.flatten(-ctx.spatial)) * multiplier
        result = gradient.new_zeros(ctx.shape)
        ctx.pairing.given(result.flatten(-ctx.spatial)).scatter_add_(-1, place, shares)
        return result, None, None, None


class Product(Function):
    """a · b, elementwise, with the mean of the other factor as each one's multiplier."""

    @staticmethod
    def forward(
        ctx: Any,
        first: Tensor,
        second: Tensor,
        pairing: Pairing,
        multiply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        _save_means(ctx, first, second, pairing)
        outputs = multiply(first, second)
        if outputs is first:
            ctx.mark_dirty(first)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *_shares(ctx, gradient, torch.mul, torch.mul), None, None


class MatrixProduct(Function):
    """A @ B over the last two axes, with the mean of the other factor as each one's multiplier."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, pairing: Pairing) -> Tensor:
        _save_means(ctx, first, second, pairing)
        return first @ second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        first, second = _shares(
            ctx,
            gradient,
            to_first=lambda given, second: given @ second.mT,
            to_second=lambda given, first: first.mT @ given,
        )
        return first, second, None


def _much_smaller(change: Tensor, values: Tensor) -> Tensor:
    """Where |Δ| ≤ √ε |values|, so that rounding spoils a ratio more than a derivative misses it.

    Relative, so that it does not depend on the scale of a layer, nor reach over a kink at 0.
    """
    tolerance = torch.finfo(values.dtype).eps ** 0.5
    return change.abs() <= values.abs().mul_(tolerance)


def derivative(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The ordinary derivative of an elementwise function, of the shape of ``inputs``."""
    with torch.enable_grad():
        at = inputs.detach().requires_grad_()
        # The clone lets a function work in place.
        (slope,) = torch.autograd.grad(function(at.clone()).sum(), at)
    return slope


def _save_means(ctx: Any, first: Tensor, second: Tensor, pairing: Pairing) -> None:
    """Keep of each factor the mean of input and reference, if the other one asks for it."""
    ctx.shapes, ctx.pairing = (first.shape, second.shape), pairing
    first_asks, second_asks, *_ = ctx.needs_input_grad
    common = torch.result_type(first, second)
    ctx.save_for_backward(
        _mean(*pairing.split(first.to(common))) if second_asks else None,
        _mean(*pairing.split(second.to(common))) if first_asks else None,
    )


def _mean(given: Tensor, reference: Tensor) -> Tensor:
    return torch.lerp(given, reference, 0.5)


def _shares(
    ctx: Any,
    gradient: Tensor,
    to_first: Callable[[Tensor, Tensor], Tensor],
    to_second: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of both factors, from the mean of the other."""
    given = ctx.pairing.given(gradient)
    shares = (
        None if mean is None else _fit(share(given.to(mean.dtype), mean), shape, ctx.pairing)
        for share, mean, shape in zip(
            (to_first, to_second), reversed(ctx.saved_tensors), ctx.shapes, strict=True
        )
    )
    first, second = shares
    return first, second


def _fit(shares: Tensor, shape: torch.Size, pairing: Pairing) -> Tensor:
    """A gradient of ``shape``, summed over axes along which a factor was repeated."""
    return pairing.returned(shares.sum_to_size(len(shares), *shape[1:]), shape)


def _pools() -> dict[Callable[..., Any], tuple[Callable[..., Any], int]]:
    pools: dict[Callable[..., Any], tuple[Callable[..., Any], int]] = {}
    for spatial in (1, 2, 3):
        for kind in ("max_pool", "adaptive_max_pool"):
            with_indices = getattr(functional, f"{kind}{spatial}d_with_indices")
            pools[with_indices] = with_indices, spatial
            pools[getattr(functional, f"{kind}{spatial}d")] = with_indices, spatial
        pools[getattr(torch, f"max_pool{spatial}d")] = pools[
            getattr(functional, f"max_pool{spatial}d")
        ]
    return pools


POOLS = _pools()
"""Max pooling function -> its variant that also gives the indices, and its spatial axes."""
