"""FGSM and PGD from captum.robust, in the units of the pixels, on the logits of a model.

captum takes the negative logarithm of the outputs for the loss, which suits probabilities, treats
small gradients as zero, and knows nothing of the normalisation of the inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import evaluation
from nss_prune.core.outputs import cross_entropy
from nss_prune.errors import ArgumentError, DataError, NSSPruneError

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Function of (model, inputs, labels) that gives adversarial inputs of the same shape."""


PerChannel = float | Sequence[float] | Tensor
"""One number, or one for each channel (axis 1 of the inputs)."""

ROUNDING = 1e-4
"""How far beyond the bounds inputs may be, relative to the range: normalising rounds."""


@dataclass(frozen=True)
class FGSM:
    """Fast gradient sign method, x' = x + ε sign ∇L (arXiv:1412.6572).

    The model attacked is in evaluation mode; it is left as found, and no gradient remains.

    Args:
        epsilon: How far each value may move, in the units of the inputs before ``normalization``.
        normalization: Mean and standard deviation by which the inputs were normalised, if they
            were: then ``epsilon`` and ``bounds`` are in the units before that.
        bounds: The least and the largest valid value; None where there are none.

    Raises:
        ArgumentError: An argument is outside what it may be.
    """

    epsilon: PerChannel = 8 / 255
    normalization: tuple[PerChannel, PerChannel] | None = None
    bounds: tuple[PerChannel, PerChannel] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_positive("epsilon", self.epsilon)
        _check_region(self.normalization, self.bounds)

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Any) -> Tensor:
        """Adversarial inputs, of the shape, dtype and device of ``inputs`` (``[samples, ...]``).

        Raises:
            DataError: Inputs outside the bounds, or labels that are not classes of the outputs.
            ArgumentError: Numbers per channel, but not as many as the inputs have channels.
        """
        region = _Region.of(self, inputs)
        from captum.robust import FGSM as CaptumFGSM  # here, because it takes seconds

        attack = CaptumFGSM(model, _loss, region.lower, region.upper)
        attack.zero_thresh = 0.0
        with _attacking(model):
            moved: Tensor = attack.perturb(inputs.detach().clone(), region.epsilon, labels)
        return moved.detach()


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent: steps of FGSM, each put back into range (arXiv:1706.06083).

    The model attacked is in evaluation mode; it is left as found, and no gradient remains.

    Args:
        epsilon: How far each value may move, in the units of the inputs before ``normalization``.
        normalization: As for :class:`FGSM`.
        bounds: As for :class:`FGSM`.
        step_size: Of one step, in the units of ``epsilon``; a quarter of it by default (CIFAR-10:
            8/255 in steps of 2/255).
        steps: Their number.
        random_start: Whether to begin at a random point within ``epsilon``.

    Raises:
        ArgumentError: An argument is outside what it may be.
    """

    epsilon: PerChannel = 8 / 255
    normalization: tuple[PerChannel, PerChannel] | None = None
    bounds: tuple[PerChannel, PerChannel] | None = (0.0, 1.0)
    step_size: PerChannel | None = None
    steps: int = 10
    random_start: bool = True

    def __post_init__(self) -> None:
        _check_positive("epsilon", self.epsilon)
        if self.step_size is not None:
            _check_positive("step_size", self.step_size)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ArgumentError(f"steps is {self.steps!r}; give 1 or more")
        _check_region(self.normalization, self.bounds)

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Any) -> Tensor:
        """Adversarial inputs; see :meth:`FGSM.__call__`."""
        region = _Region.of(self, inputs)
        step = region.epsilon / 4
        if self.step_size is not None:
            step = _scaled(self.step_size, self.normalization, inputs, "step_size")
        from captum.robust import PGD as CaptumPGD  # here, because it takes seconds

        attack = CaptumPGD(model, _loss, region.lower, region.upper)
        attack.fgsm.zero_thresh = 0.0
        with _attacking(model):
            moved: Tensor = attack.perturb(
                inputs.detach().clone(),
                region.epsilon,
                step,
                self.steps,
                labels,
                random_start=self.random_start,
            )
        return moved.detach()


def make_attack(
    attack: str | Attack,
    epsilon: PerChannel = 8 / 255,
    normalization: tuple[PerChannel, PerChannel] | None = None,
) -> Attack:
    """An attack by name, "fgsm" or "pgd", or the function given.

    Raises:
        ArgumentError: There is no such attack, or ε cannot be one.
    """
    if attack == "fgsm":
        return FGSM(epsilon, normalization)
    if attack == "pgd":
        return PGD(epsilon, normalization)
    if callable(attack):
        return attack
    raise ArgumentError(
        f"attack is {attack!r}; use 'fgsm', 'pgd', FGSM(...), PGD(...), or a function of (model, "
        "inputs, labels) that gives adversarial inputs"
    )


def attacked(attack: Attack, model: nn.Module, inputs: Any, labels: Any) -> Tensor:
    """Adversarial inputs by any attack, with the model in evaluation mode and then as before.

    Raises:
        DataError: The attack fails, or does not give inputs of the same shape.
    """
    try:
        with evaluation(model), torch.enable_grad():
            moved = attack(model, inputs, labels)
    except NSSPruneError:
        raise
    except Exception as error:
        raise DataError(
            f"the attack fails on inputs of shape {getattr(inputs, 'shape', None)}: {error}; give "
            "data that the model takes, and labels that are classes of its outputs"
        ) from error
    if not isinstance(moved, Tensor) or moved.shape != getattr(inputs, "shape", None):
        kind = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
        raise DataError(
            f"the attack gives {kind}; it must give a tensor of the shape of its inputs"
        )
    return moved.detach()


@dataclass(frozen=True)
class _Region:
    """Where adversarial inputs may be, in the units that the model reads.

    Attributes:
        epsilon: ``[1, channels or 1, 1, ...]``.
        lower: Likewise, or −∞.
        upper: Likewise, or ∞.
    """

    epsilon: Tensor
    lower: Tensor | float
    upper: Tensor | float

    @staticmethod
    def of(attack: FGSM | PGD, inputs: Tensor) -> _Region:
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2:
            kind = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
            raise DataError(
                f"an attack needs inputs as one tensor [samples, channels, ...] of floats, these "
                f"are {kind}; pass a function of (model, inputs, labels) as the attack"
            )
        normalization = attack.normalization
        epsilon = _scaled(attack.epsilon, normalization, inputs, "epsilon")
        if attack.bounds is None:
            return _Region(epsilon, float("-inf"), float("inf"))
        lower, upper = (
            _scaled(_shifted(bound, normalization, inputs), normalization, inputs, "bounds")
            for bound in attack.bounds
        )
        slack = ROUNDING * (upper - lower)
        if bool(((inputs < lower - slack) | (inputs > upper + slack)).any()):
            raise DataError(
                f"the inputs reach from {float(inputs.min()):.4g} to {float(inputs.max()):.4g}, "
                f"beyond the bounds {attack.bounds} with normalization={normalization}; give the "
                "normalization=(mean, std) that the inputs went through, or other bounds"
            )
        return _Region(epsilon, lower, upper)


def _shifted(
    value: PerChannel, normalization: tuple[PerChannel, PerChannel] | None, inputs: Tensor
) -> Tensor:
    by_channel = _by_channel(value, inputs, "bounds")
    if normalization is None:
        return by_channel
    return by_channel - _by_channel(normalization[0], inputs, "the mean")


def _scaled(
    value: PerChannel,
    normalization: tuple[PerChannel, PerChannel] | None,
    inputs: Tensor,
    name: str,
) -> Tensor:
    by_channel = _by_channel(value, inputs, name)
    if normalization is None:
        return by_channel
    return by_channel / _by_channel(normalization[1], inputs, "the standard deviation")


def _by_channel(value: PerChannel, inputs: Tensor, name: str) -> Tensor:
    """``[1, channels or 1, 1, ...]``, on the device of the inputs."""
    numbers = torch.as_tensor(value, dtype=inputs.dtype, device=inputs.device)
    if numbers.dim() == inputs.dim():
        return numbers
    if numbers.numel() not in (1, inputs.shape[1]):
        raise ArgumentError(
            f"{name} has {numbers.numel()} numbers for inputs of shape {tuple(inputs.shape)}; give "
            f"one, or one for each of the {inputs.shape[1]} channels"
        )
    return numbers.reshape(1, -1, *[1] * (inputs.dim() - 2))


def _check_positive(name: str, value: PerChannel) -> None:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{name} is {value!r}; give a number, or one per channel") from error
    if not bool((numbers.isfinite() & (numbers > 0)).all()) or not numbers.numel():
        raise ArgumentError(f"{name} is {value!r}; give positive numbers, for example 8 / 255")


def _check_region(
    normalization: tuple[PerChannel, PerChannel] | None,
    bounds: tuple[PerChannel, PerChannel] | None,
) -> None:
    for name, pair in (("normalization", normalization), ("bounds", bounds)):
        if pair is not None and (not isinstance(pair, (tuple, list)) or len(pair) != 2):
            raise ArgumentError(f"{name} is {pair!r}; give two: (mean, std), or (least, largest)")
    if normalization is not None:
        _check_positive("the standard deviation of normalization", normalization[1])
    if bounds is not None:
        least, largest = (torch.as_tensor(bound, dtype=torch.float64) for bound in bounds)
        if not bool((least < largest).all()):
            raise ArgumentError(f"bounds is {bounds!r}; the least value comes first")


def _loss(outputs: Any, labels: Any) -> Tensor:
    """The sum over samples, ``[1]``: each sample's gradient is its own, whatever the batch."""
    return cross_entropy(outputs, labels)[None]


@contextmanager
def _attacking(model: nn.Module) -> Iterator[None]:
    with evaluation(model), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input Tensor .* did not already require")
        yield
