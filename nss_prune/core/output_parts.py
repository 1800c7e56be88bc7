"""One tensor of a model's outputs as the parameters of a distribution.

Three kinds: "classes", a softmax over one axis; "labels", an independent sigmoid for every entry;
"values", a Gaussian around every entry, with the variance of the outputs themselves. Each is asked
for the divergence of two outputs, for a random vector with its Fisher information as covariance,
and for the loss of labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from nss_prune.core.batches import as_computed
from nss_prune.core.nested import Path, at_path, tensors_in
from nss_prune.errors import ArgumentError, DataError, NumericalError

Kind = Literal["classes", "labels", "values"]
KINDS: tuple[Kind, ...] = ("classes", "labels", "values")

AT_ONCE = 2**24  # entries whose divergence is computed at once, in float64


@dataclass(frozen=True)
class Part:
    """One tensor of the outputs, and what it means.

    Attributes:
        path: Keys, positions and names of fields that lead to it; () for the output itself.
        kind: "classes", "labels" or "values".
        axis: Of the classes, labels or channels; None where a sample has one entry, ``[samples]``.
        size: Entries along the axis.
        weight: Factor of its divergence and of its loss.
        mean: Of each channel over samples and positions, ``[size]``; "values" only.
        variance: As ``mean``. None: not measured, the unit is 1.

    Raises:
        ArgumentError: A kind, axis or weight that there is not.
    """

    path: Path
    kind: Kind
    axis: int | None
    size: int
    weight: float = 1.0
    mean: tuple[float, ...] | None = None
    variance: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"an output is {self.kind!r}; use one of {KINDS}")
        if not 0 < self.weight < float("inf"):
            raise ArgumentError(f"the weight of {self.name} is {self.weight!r}; use one above 0")
        if self.kind == "classes" and (self.axis is None or self.size < 2):
            raise ArgumentError(
                f"{self.name} has one score for each sample, whose softmax is always 1; use "
                "outputs='labels' for a sigmoid or outputs='values' for a regression"
            )
        if self.axis == 0:
            raise ArgumentError(
                f"axis 0 of {self.name} holds the samples; give the axis of its {self.kind}"
            )

    @property
    def name(self) -> str:
        """The path in words."""
        return "output " + ".".join(map(repr, self.path)) if self.path else "the output"

    def find(self, outputs: Any) -> Tensor:
        """Its tensor, as the model gives it.

        Raises:
            DataError: There is none of the right size.
        """
        tensor = at_path(outputs, self.path)
        if not isinstance(tensor, Tensor):
            shapes = [tuple(found.shape) for found in tensors_in(outputs)]
            raise DataError(
                f"{self.name} is missing in a {type(outputs).__name__} with tensors {shapes}; the "
                "model must give the same outputs for every batch"
            )
        axis = self.axis
        least = 1 if axis is None else 2 if axis < 0 else axis + 1
        if tensor.dim() < least or (axis is not None and tensor.shape[axis] != self.size):
            raise DataError(
                f"{self.name} has shape {tuple(tensor.shape)}, where {self.size} {self.kind} on "
                f"axis {axis} were seen before; the model must give the same outputs for every "
                "batch"
            )
        return tensor

    def entries(self, outputs: Any) -> Tensor:
        """Its entries, float32 at least, ``[samples, positions, size]``."""
        return self.arranged(as_computed(self.find(outputs)))

    def arranged(self, tensor: Tensor) -> Tensor:
        """A tensor of its shape as ``[samples, positions, size]``."""
        last = tensor.unsqueeze(-1) if self.axis is None else tensor.movedim(self.axis, -1)
        return last.reshape(len(tensor), -1, self.size)

    def drawn(self, outputs: Any, generator: torch.Generator) -> Tensor:
        """Sum whose gradient by the entries is the random vector of :meth:`_draw`, a scalar."""
        entries = self.entries(outputs)
        signs = torch.randint(2, entries.shape, generator=generator).to(entries) * 2 - 1
        return (entries * self._draw(entries.detach(), signs)).sum() * self.weight**0.5

    def _draw(self, entries: Tensor, signs: Tensor) -> Tensor:
        """Vectors whose covariance over random signs is the Fisher information of the entries.

        With signs s: Σ_c s_c √p_c (1_c − p) has E[v vᵀ] = diag(p) − p pᵀ; s √(p (1 − p)) has
        diag(p (1 − p)); s / σ has I / σ². The gradient of −log p(y) with y drawn from p has the
        same covariance, but for a confident sample it is large for a y that is hardly ever drawn.
        """
        if self.kind == "classes":
            chances = entries.softmax(-1)
            roots = signs * chances.sqrt()
            return roots - chances * roots.sum(-1, keepdim=True)
        if self.kind == "labels":
            return signs * (entries.sigmoid() * (-entries).sigmoid()).sqrt()
        return signs / self.deviation(entries)

    def deviation(self, like: Tensor) -> Tensor:
        """σ of each channel in the type of a tensor, ``[size]``."""
        if self.variance is None:
            return like.new_ones(self.size)
        return torch.tensor(self.variance, dtype=torch.float64).sqrt().to(like)

    def divergence(self, whole: Any, other: Any) -> Tensor:
        """KL divergence of the other outputs from the whole ones, float64 ``[samples]``, in nats.

        Raises:
            DataError: The outputs differ in shape.
        """
        wanted, got = (self.arranged(self.find(outputs).detach()) for outputs in (whole, other))
        if wanted.shape != got.shape:
            raise DataError(
                f"{self.name} has {tuple(wanted.shape)} entries [samples, positions, "
                f"{self.kind}] in one model and {tuple(got.shape)} in the other; compare them on "
                "the same batch"
            )
        samples = max(1, AT_ONCE // max(1, wanted[:1].numel()))
        pairs = zip(wanted.split(samples), got.split(samples), strict=True)
        found = [self._divergence(a.double(), b.double()).sum((1, 2)) for a, b in pairs]
        return torch.cat(found) * self.weight

    def _divergence(self, whole: Tensor, other: Tensor) -> Tensor:
        """What each entry adds, of the shape of the entries."""
        if self.kind == "classes":
            logarithms = whole.log_softmax(-1)
            chances = logarithms.exp()
            terms = chances * (logarithms - other.log_softmax(-1))
            return terms.where(chances > 0, 0.0)  # a score of -inf in both adds nothing
        if self.kind == "labels":
            yes, no = whole.sigmoid(), (-whole).sigmoid()
            return yes * (functional.logsigmoid(whole) - functional.logsigmoid(other)) + no * (
                functional.logsigmoid(-whole) - functional.logsigmoid(-other)
            )
        return ((whole - other) / self.deviation(whole)).square() / 2

    def predicted(self, outputs: Any) -> Tensor:
        """The class predicted, ``[samples, ...]``; for labels 0 or 1, ``[samples, labels, ...]``.

        One label for each sample comes as ``[samples]``.

        Raises:
            DataError: It has no classes.
        """
        tensor = self.find(outputs).detach()
        if self.kind == "classes":
            assert self.axis is not None
            return tensor.argmax(self.axis)
        if self.kind == "labels":
            found = (tensor > 0).long()
            return found.flatten() if found.numel() == len(found) else found
        raise DataError(f"{self.name} holds values, of which none is a predicted class")

    def loss(self, outputs: Any, labels: Tensor | None) -> Tensor:
        """Negative log-likelihood of labels, summed over samples and positions, a scalar.

        Cross entropy with class indices, where -100 is left out of positions; binary cross entropy
        with zeros and ones; half the squared error in units of the variance.

        Args:
            labels: None for the predicted classes, and for the mean of the values.

        Raises:
            DataError: The labels do not fit.
        """
        entries = self.entries(outputs)
        if labels is None:
            return self._own_loss(entries) * self.weight
        labels = labels.to(entries.device)
        if not self.fits(labels, outputs):
            raise DataError(self._refusal(labels, outputs))
        if self.kind == "classes" and not is_shares(labels, self.find(outputs)):
            return self._class_loss(entries, labels) * self.weight
        wanted = self.arranged(labels.reshape(self.find(outputs).shape)).to(entries)
        return self._entry_loss(entries, wanted) * self.weight

    def fits(self, labels: Tensor, outputs: Any) -> bool:
        """Whether labels are of the shape and type that its loss takes."""
        tensor = self.find(outputs)
        if self.kind != "classes":
            alike = aligned(labels, tensor) is not None
            return alike and (self.kind == "values" or is_binary(labels))
        if is_shares(labels, tensor):
            return True
        places = tensor.select(self.axis or 0, 0).shape
        return squeezed(labels.shape) == squeezed(places) and not labels.is_floating_point()

    def _refusal(self, labels: Tensor, outputs: Any) -> str:
        wanted = {
            "classes": "class indices are needed, one for each sample and position",
            "labels": "zeros and ones of the shape of the outputs are needed",
            "values": "values of the shape of the outputs are needed",
        }
        return (
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} for outputs "
            f"{tuple(self.find(outputs).shape)}, taken for {self.kind}; {wanted[self.kind]}, or "
            "outputs= that says what the outputs are, or loss=function(outputs, labels)"
        )

    def _class_loss(self, entries: Tensor, labels: Tensor) -> Tensor:
        check_range(labels, self.size)
        places = labels.reshape(-1).long()
        return functional.cross_entropy(entries.flatten(0, 1), places, reduction="sum")

    def _entry_loss(self, entries: Tensor, wanted: Tensor) -> Tensor:
        if self.kind == "classes":
            return -(wanted * entries.log_softmax(-1)).sum()
        if self.kind == "labels":
            return functional.binary_cross_entropy_with_logits(entries, wanted, reduction="sum")
        return ((entries - wanted) / self.deviation(entries)).square().sum() / 2

    def _own_loss(self, entries: Tensor) -> Tensor:
        """The loss without labels."""
        known = entries.detach()
        if self.kind == "classes":
            return self._class_loss(entries, known.argmax(-1))
        if self.kind == "labels":
            return self._entry_loss(entries, (known > 0).to(entries))
        centre = known.mean((0, 1)) if self.mean is None else known.new_tensor(self.mean)
        return self._entry_loss(entries, centre)

    def measured(self, spread: Spread) -> Part:
        """The same with the mean and variance of outputs, over samples and positions.

        Raises:
            NumericalError: Outputs are NaN or infinite.
        """
        if not torch.isfinite(spread.squares.sum()):
            raise NumericalError(
                f"{self.name} is NaN or infinite; check the data and the model's weights"
            )
        return replace(self, mean=spread.mean(), variance=spread.variance())

    def describe(self) -> str:
        """Its meaning in words."""
        of = f" of {self.name}" if self.path else ""
        weight = "" if self.weight == 1 else f", weight {self.weight:g}"
        if self.kind == "classes":
            return f"softmax over axis {self.axis} ({self.size} classes){of}{weight}"
        if self.kind == "labels":
            count = "one label" if self.size == 1 else f"{self.size} labels"
            return f"sigmoids ({count}){of}{weight}"
        unit = "" if self.variance is None else " in units of their variance"
        return f"values (squared error{unit}){of}{weight}"


class Spread:
    """Mean and variance of a stream of ``[samples, positions, size]``, around its first batch."""

    def __init__(self) -> None:
        self.count = 0
        self.epsilon = 0.0
        self.shift = self.total = self.squares = torch.zeros(())

    def add(self, entries: Tensor) -> None:
        """Add a batch."""
        self.epsilon = max(self.epsilon, torch.finfo(entries.dtype).eps)
        values = entries.flatten(0, 1).double().cpu()
        if not self.count:
            self.shift = values.mean(0)
            self.total = self.squares = torch.zeros_like(self.shift)
        centred = values - self.shift
        self.count += len(values)
        self.total = self.total + centred.sum(0)
        self.squares = self.squares + centred.square().sum(0)

    def mean(self) -> tuple[float, ...]:
        """Of each channel."""
        return tuple((self.shift + self.total / self.count).tolist())

    def variance(self) -> tuple[float, ...]:
        """Of each channel, unbiased; 1 where it is no more than rounding, or of one value."""
        if self.count < 2:
            return (1.0,) * len(self.shift)
        variance = (self.squares - self.total**2 / self.count) / (self.count - 1)
        size = (self.shift + self.total / self.count).abs() + variance.clamp(min=0).sqrt()
        constant = variance <= (8 * self.epsilon * size) ** 2
        return tuple(variance.masked_fill(constant, 1.0).tolist())


def aligned(labels: Tensor, tensor: Tensor) -> Tensor | None:
    """Labels in the shape of a tensor, where they differ by axes of size 1 alone; else None."""
    same = squeezed(labels.shape) == squeezed(tensor.shape)
    return labels.reshape(tensor.shape) if same else None


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    """A shape without its axes of size 1, the first excepted."""
    return (*shape[:1], *(size for size in shape[1:] if size != 1))


def is_binary(labels: Tensor) -> bool:
    """Whether all are zeros and ones."""
    return bool(((labels == 0) | (labels == 1)).all())


def is_shares(labels: Tensor, tensor: Tensor) -> bool:
    """Whether labels are a share of each class: of the shape of the scores, or zeros and ones."""
    return labels.shape == tensor.shape and (labels.is_floating_point() or is_binary(labels))


def check_range(labels: Tensor, classes: int) -> None:
    """Raise DataError unless all labels are classes; -100 is cross entropy's 'ignore'."""
    counted = labels[labels != -100] if labels.dim() > 1 else labels
    if counted.numel() == 0:
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels run from {low} to {high}, but the model has {classes} classes: 0 to "
            f"{classes - 1}; correct the labels, or give outputs= if these are no classes"
        )
