"""DeepLIFT's rescale rule for every nonlinearity of any model, in one forward and one backward.

The model runs on N inputs followed by the reference of each, or by the one of all. Linear
functions pass a multiplier on as they pass a gradient on; a nonlinear one must pass on Δout/Δin
instead of its derivative (Shrikumar et al., "Learning Important Features Through Propagating
Activation Differences", ICML 2017, section 3.5.2). Then Σ (a − a_ref) · multiplier over any cut
through the network is the change of the output: the contributions are complete (Eq. 1).

The rule works on functions, not on modules, so that it also holds for ``F.relu``, for modules
that are used twice, for in-place activations, and for neighbours such as ReLU and MaxPool:

- elementwise functions: Δout/Δin, and the derivative where Δin is too small to divide by;
- max pooling: each window gives all of its Δout to one position (see :class:`MaxPool`);
- products and quotients of two activations, elementwise or as matrices: each factor is
  multiplied by the mean of the other over input and reference, because
  ab − a'b' = (a − a')(b + b')/2 + (a + a')/2 (b − b'). This is the Shapley value of two factors.

Everything else keeps its plain gradient, and the names of what is not linear are collected in
:attr:`RescaleRule.uncovered`: softmax, fused attention, LayerNorm and GroupNorm, BatchNorm in
training mode, and whatever else autograd recorded that is not known to be linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nss_prune.profiling.contributions.multipliers import (
    POOLS,
    MatrixProduct,
    MaxPool,
    Pairing,
    Product,
    Rescale,
)

# fmt: off
ELEMENTWISE = frozenset({
    "relu", "relu6", "hardtanh", "threshold", "_threshold", "leaky_relu", "rrelu", "elu", "celu",
    "selu", "prelu", "gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "expit", "tanh",
    "softplus", "softsign", "softshrink", "hardshrink", "tanhshrink", "logsigmoid", "log_sigmoid",
    "clamp", "clip", "clamp_min", "clamp_max", "exp", "expm1", "exp2", "log", "log1p", "log2",
    "log10", "sqrt", "rsqrt", "square", "pow", "__rpow__", "reciprocal", "__rdiv__", "abs", "sin",
    "cos", "tan", "atan", "sinh", "cosh", "asinh", "erf", "erfc",
})
"""Functions of one activation, by name without the underscore of the in-place variant."""

PRODUCTS = frozenset({"mul", "multiply"})
QUOTIENTS = frozenset({"div", "divide", "true_divide"})
MATRIX_PRODUCTS = frozenset({"matmul", "bmm"})
BACKWARD = frozenset({"backward", "grad"})
LINEAR = frozenset({
    "AccumulateGrad", "Add", "Sub", "Rsub", "Neg", "Sum", "Mean", "Cumsum", "Alias", "View",
    "Reshape", "ReshapeAlias", "UnsafeView", "AsStrided", "Expand", "Squeeze", "Unsqueeze",
    "Permute", "Transpose", "T", "Diagonal", "Tril", "Triu", "Trace", "Clone", "Copy", "ToCopy",
    "Cat", "Stack", "Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Unbind",
    "Slice", "Select", "Index", "IndexSelect", "Gather", "Repeat", "RepeatInterleave", "Roll",
    "Flip", "Unfold", "Im2Col", "Col2Im", "ConstantPadNd", "ReflectionPad1D", "ReflectionPad2D",
    "ReflectionPad3D", "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "PixelShuffle",
    "PixelUnshuffle", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D",
    "MkldnnAdaptiveAvgPool2D", "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D",
    "UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D",
    "UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleBilinear2DAa", "UpsampleBicubic2D",
    "UpsampleBicubic2DAa", "UpsampleTrilinear3D", "FftR2C", "FftC2R", "FftC2C", "ViewAsReal",
    "ViewAsComplex", "Real", "Imag",
})
"""What autograd calls the functions that are linear in all of their inputs together."""

BILINEAR = frozenset({
    "Mul", "Mm", "Bmm", "Mv", "Dot", "Addmm", "Addmv", "Addbmm", "Baddbmm", "Addcmul", "Linear",
    "Convolution", "MkldnnConvolution", "CudnnConvolution",
})
"""What autograd calls the functions that are linear while a single input depends on the data."""

LINEAR_IN_FIRST = frozenset({"Div", "GridSampler2D", "GridSampler3D"})
"""The same, where that input must be the first."""


# fmt: on
class RescaleRule(TorchFunctionMode):
    """While entered, models propagate DeepLIFT's multipliers instead of gradients.

    The batch holds ``samples + references`` samples along its first axis: the inputs, then the
    reference of each, or a single one for all. The model should be in evaluation mode and its
    parameters frozen (as in :func:`nss_prune.core.models.evaluation`): functions of two tensors
    that both need a gradient count as uncovered otherwise. So do in-place functions of a part of a
    tensor (``"copy_slices"``), because autograd does not say which they are. The backward pass
    cannot be differentiated again, sends nothing back to the references, and does not follow what
    leaves autograd (``detach``, ``argmax``).

    Args:
        samples: Number of inputs N.
        references: Number of references, N (the default) or 1.

    Attributes:
        uncovered: Nonlinear functions that kept their plain gradient, as autograd calls them,
            for example ``{"softmax", "native_layer_norm"}``. Known once a backward pass has run
            inside the context, or after :meth:`inspect`.
    """

    def __init__(self, samples: int, references: int | None = None) -> None:
        super().__init__()
        self.pairing = Pairing(samples, samples if references is None else references)
        self.uncovered: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keywords = kwargs or {}
        name = _plain_name(func)
        if name in BACKWARD:
            self.inspect(*([args[0]] if isinstance(args[0], Tensor) else args[0]))
        elif torch.is_grad_enabled():
            rule = self._rule(func, name, args, keywords)
            if rule is not None:
                return rule()
        return func(*args, **keywords)

    def inspect(self, *outputs: Tensor) -> None:
        """Add to :attr:`uncovered` what the gradients of ``outputs`` will pass through."""
        waiting = [output.grad_fn for output in outputs if output.grad_fn is not None]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if not _is_covered(node):
                self.uncovered.add(_readable(node))
            inputs = {before for before, _ in node.next_functions if before is not None} - seen
            seen |= inputs
            waiting += inputs

    def _rule(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Callable[[], Any] | None:
        """The call that replaces ``func(*args, **keywords)``, or None for the call itself."""
        if len(args) == 2 and not keywords and self._are_factors(*args):
            if name in PRODUCTS:
                return lambda: Product.apply(*args, self.pairing, func)
            if name in QUOTIENTS:
                return lambda: Product.apply(
                    args[0], self._inverse(args[1]), self.pairing, _product_like(func)
                )
            if name in MATRIX_PRODUCTS and args[0].dim() > 2:
                return lambda: MatrixProduct.apply(*args, self.pairing)
        # A number over an activation is the one function whose activation comes second.
        if name in QUOTIENTS and len(args) == 2 and not keywords and self._is_followed(args[1]):
            return lambda: _product_like(func)(args[0], self._inverse(args[1]))
        if not args or not self._is_followed(args[0]):
            return None
        if func in POOLS:
            return lambda: self._pool(func, *args, **keywords)
        if name == "glu":
            return lambda: self._gated(*args, **keywords)
        others = (*args[1:], *keywords.values())
        if name in ELEMENTWISE and not any(self._are_factors(args[0], other) for other in others):
            pointwise = not any(isinstance(other, Tensor) for other in others)
            return lambda: Rescale.apply(
                args[0], self.pairing, lambda x: func(x, *args[1:], **keywords), pointwise
            )
        return None

    def _pool(self, func: Callable[..., Any], inputs: Tensor, *args: Any, **keywords: Any) -> Any:
        with_indices, spatial = POOLS[func]
        results = MaxPool.apply(
            inputs, self.pairing, lambda x: with_indices(x, *args, **keywords), spatial
        )
        return results if func is with_indices else results[0]

    def _gated(self, inputs: Tensor, dim: int = -1) -> Any:
        """``F.glu`` as the product that it is."""
        value, gate = inputs.chunk(2, dim)
        opened = Rescale.apply(gate, self.pairing, torch.sigmoid)
        return Product.apply(value, opened, self.pairing, torch.mul)

    def _inverse(self, divisor: Tensor) -> Any:
        """1 / b, so that a / b is a product."""
        return Rescale.apply(divisor, self.pairing, torch.reciprocal)

    def _is_paired(self, value: Any) -> bool:
        """Whether the first axis can hold the inputs and then the references."""
        if not isinstance(value, Tensor) or value.dim() == 0 or value.is_complex():
            return False
        rows = value.shape[0]
        return rows > 0 and rows % sum(self.pairing) == 0

    def _is_followed(self, value: Any) -> bool:
        return self._is_paired(value) and bool(value.requires_grad)

    def _are_factors(self, first: Any, second: Any) -> bool:
        """Whether both hold inputs and references along the same axis, and one is followed.

        The other one may be computed from the data before the first gradient is asked for; a
        constant is the mean of its equal halves, so nothing changes for it.
        """
        return (
            self._is_paired(first)
            and self._is_paired(second)
            and first.dim() == second.dim()
            and first.shape[0] == second.shape[0]
            and bool(first.requires_grad or second.requires_grad)
        )


def _product_like(func: Callable[..., Any]) -> Callable[..., Any]:
    """The product that works in place if the quotient ``func`` does."""
    return Tensor.mul_ if func.__name__.endswith("_") else torch.mul


def _plain_name(func: Callable[..., Any]) -> str:
    """The name of a function or of its in-place variant."""
    name = getattr(func, "__name__", "")
    return str(name if name.startswith("__") else name.rstrip("_"))


def _is_covered(node: Any) -> bool:
    """Whether multipliers pass a node of the autograd graph exactly."""
    if getattr(node, "_forward_cls", None) in (Rescale, MaxPool, Product, MatrixProduct):
        return True
    name = _autograd_name(node)
    followed = [before is not None for before, _ in node.next_functions]
    if name in BILINEAR:
        return sum(followed) <= 1
    if name in LINEAR_IN_FIRST:
        return not followed[1]
    if "BatchNorm" in name:
        return getattr(node, "_saved_training", True) is False
    return name in LINEAR


def _autograd_name(node: Any) -> str:
    """``"torch::autograd::MulBackward0"`` -> ``"Mul"``."""
    return re.sub(r"(Backwards?\d*)?$", "", str(node.name()).rsplit("::", 1)[-1], count=1)


def _readable(node: Any) -> str:
    """``"NativeLayerNormBackward0"`` -> ``"native_layer_norm"``."""
    return re.sub(r"(?<=[a-zD])(?=[A-Z][a-z])", "_", _autograd_name(node)).lower()
