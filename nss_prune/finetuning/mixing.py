"""timm's mixup and cutmix, and its losses by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nss_prune.errors import ArgumentError, DataError


class Mixup:
    """timm's Mixup, which draws by torch's random numbers: a seed means the same course.

    Args:
        mixup: α of mixup (arXiv:1710.09412), 0 for none.
        cutmix: α of cutmix (arXiv:1905.04899), 0 for none.
        smoothing: Of the labels, in [0, 1).
        classes: Their number.

    Raises:
        ArgumentError: One is outside what it may be.
    """

    def __init__(self, mixup: float, cutmix: float, smoothing: float, classes: int) -> None:
        from timm.data import Mixup as TimmMixup  # type: ignore[attr-defined]  # it takes long

        self.smoothing = smoothing
        self.classes = classes
        self._mix: Any = TimmMixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            label_smoothing=smoothing,
            num_classes=classes,
        )

    def __call__(self, inputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed inputs, and the probability of each class ``[samples, classes]``.

        A batch of an odd number of samples is left as it is.

        Raises:
            DataError: The inputs are no single tensor of floats, or the labels no classes.
        """
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or labels.dim() != 1:
            raise DataError(
                "mixup needs inputs as one tensor of floats [samples, ...] and one class index for "
                "each; give mixup=0, cutmix=0"
            )
        from timm.data.mixup import mixup_target

        if len(inputs) % 2:
            targets: Tensor = mixup_target(labels, self.classes, 1.0, self.smoothing)
            return inputs, targets
        before = np.random.get_state()
        try:
            np.random.seed(int(torch.randint(2**31, ())))
            mixed, targets = self._mix(inputs.clone(), labels)
        finally:
            np.random.set_state(before)
        return mixed, targets


def mixing_of(
    mixup: float, cutmix: float, smoothing: float, classes: Callable[[], int]
) -> Mixup | None:
    """The mixing that some arguments ask for; None where they ask for none.

    Args:
        mixup, cutmix, smoothing: As :class:`Mixup` takes them.
        classes: Gives their number, where it is needed.

    Raises:
        ArgumentError: One is outside what it may be.
    """
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if not value >= 0:
            raise ArgumentError(f"{name} is {value}; give an alpha of 0 or more")
    if not 0 <= smoothing < 1:
        raise ArgumentError(f"smoothing is {smoothing}; give a number in [0, 1)")
    if not mixup and not cutmix and not smoothing:
        return None
    if not mixup and not cutmix:
        return _Smoothing(smoothing, classes())
    return Mixup(mixup, cutmix, smoothing, classes())


class _Smoothing(Mixup):
    """Smoothed labels alone."""

    def __init__(self, smoothing: float, classes: int) -> None:
        self.smoothing = smoothing
        self.classes = classes

    def __call__(self, inputs: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """The inputs as they are, and the probability of each class."""
        from timm.data.mixup import mixup_target

        return inputs, mixup_target(labels, self.classes, 1.0, self.smoothing)


def loss_by_name(name: str) -> nn.Module:
    """A loss of timm by the name of its class, such as "BinaryCrossEntropy".

    Raises:
        ArgumentError: timm has none of that name.
    """
    import timm.loss

    kind = getattr(timm.loss, name, None)
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        made: nn.Module = kind()
        return made
    known = [
        other
        for other, value in vars(timm.loss).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    ]
    raise ArgumentError(f"timm has no loss {name!r}; use {', '.join(known)}, or a function")
