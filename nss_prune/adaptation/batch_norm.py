"""Batch norms of which some channels use their running statistics while the others train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from nss_prune.core.hooks import attached
from nss_prune.errors import ArgumentError, DataError


@contextlib.contextmanager
def running_statistics(norm: _NormBase, frozen: Tensor) -> Iterator[None]:
    """Within the context, ``norm`` in training mode uses its running statistics where ``frozen``.

    These keep their bits. The other channels are normalised with the batch's statistics and update
    their own, as ever. A layer that adds an activation to its norm works alike. SyncBatchNorm
    would have to average over processes in the middle of this, and is refused where there are
    several.

    Args:
        frozen: ``[channels]``, bool, on the device of the statistics.
    """
    hooks = _Hooks(norm, frozen)
    after = partial(norm.register_forward_hook, always_call=True)
    with attached((norm.register_forward_pre_hook, hooks.before), (after, hooks.after)):
        yield


@dataclass(frozen=True)
class _Statistics:
    """The channels that are ``frozen``, ``[channels]``, and the running statistics of all."""

    frozen: Tensor
    mean: Tensor
    variance: Tensor


class _Hooks:
    def __init__(self, norm: _NormBase, frozen: Tensor) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.kept = _Statistics(frozen, norm.running_mean.clone(), norm.running_var.clone())
        self.wholly = bool(frozen.all())
        self.in_evaluation = False
        self.mode: _MixedStatistics | None = None

    def before(self, norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not norm.training:
            return
        if self.wholly:
            self.in_evaluation = True
            norm.training = False
        elif isinstance(norm, _BatchNorm):
            self.mode = _MixedStatistics(self.kept)
            self.mode.__enter__()

    def after(self, norm: nn.Module, arguments: tuple[Any, ...], outputs: Any) -> None:
        if self.in_evaluation:
            self.in_evaluation = False
            norm.training = True
        if self.mode is None:
            return
        mode, self.mode = self.mode, None
        mode.__exit__(None, None, None)
        # Outputs are None where the layer raised.
        if outputs is not None and not mode.used:
            raise ArgumentError(
                f"{type(norm).__name__} does not call torch.nn.functional.batch_norm, so that some "
                "of its channels cannot keep their running statistics; use nn.BatchNorm in its "
                "place"
            )


class _MixedStatistics(TorchFunctionMode):
    """Replaces ``torch.nn.functional.batch_norm`` by one of which some channels do not train."""

    def __init__(self, kept: _Statistics) -> None:
        super().__init__()
        self.kept = kept
        self.used = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is batch_norm:
            return self.batch_norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def batch_norm(
        self,
        inputs: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        self.used = True
        if inputs.numel() <= inputs.shape[1]:
            raise DataError(
                f"a batch norm reads {tuple(inputs.shape)}, one value per channel; training needs "
                "at least two: use batches of two samples or more"
            )
        frozen, known = self.kept.frozen, (self.kept.mean, self.kept.variance)
        found = torch.batch_norm_update_stats(inputs.detach(), running_mean, running_var, momentum)
        for running, kept in zip((running_mean, running_var), known, strict=True):
            torch.where(frozen, kept, running, out=running)
        mean, variance = (
            torch.where(frozen, kept, new) for kept, new in zip(known, found, strict=True)
        )
        output: Tensor = _MixedBatchNorm.apply(inputs, weight, bias, mean, variance, eps, frozen)
        return output


class _MixedBatchNorm(torch.autograd.Function):
    """Normalise with given statistics, which depend on the inputs where not ``frozen``."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        frozen: Tensor,
    ) -> Tensor:
        output: Tensor = torch.native_batch_norm(
            inputs, weight, bias, mean, variance, False, 0.0, eps
        )[0]
        ctx.save_for_backward(inputs, weight, mean, variance, frozen)
        ctx.eps = eps
        return output

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, mean, variance, frozen = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, inputs, weight, mean, variance, mean, scale, False, ctx.eps,
            [False, True, True],
        )  # fmt: skip
        # γσ⁻¹(g − Σg/n − x̂ Σgx̂/n), with x̂ = (x − μ)σ⁻¹, for statistics of the batch. Where they
        # are constants, the last two terms do not belong.
        factor = scale if weight is None else scale * weight
        per_value = torch.where(frozen, 0.0, factor) / -(inputs.numel() // len(mean))
        of_statistics = torch.native_batch_norm(
            inputs, per_value * of_weight, per_value * of_bias, mean, variance,
            False, 0.0, ctx.eps,
        )[0]  # fmt: skip
        of_inputs = of_statistics.add_(_scaled(gradient, factor))
        wanted = zip(ctx.needs_input_grad, (of_inputs, of_weight, of_bias), strict=False)
        return (*(value if needed else None for needed, value in wanted), None, None, None, None)


def _scaled(values: Tensor, factor: Tensor) -> Tensor:
    """Values times the factor of their channel.

    By the operation for norms: on a CPU, a product that broadcasts takes ten times as long in
    bfloat16.
    """
    none, one = torch.zeros_like(factor), torch.ones_like(factor)
    scaled: Tensor = torch.native_batch_norm(values, factor, none, none, one, False, 0.0, 0.0)[0]
    return scaled
