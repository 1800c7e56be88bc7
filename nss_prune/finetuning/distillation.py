"""Distillation: a smaller model learns what the whole one gives, and what its layers receive."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize

from nss_prune.core.arguments import on_input
from nss_prune.core.batches import as_computed as as_computed
from nss_prune.core.hooks import attached
from nss_prune.core.models import device_of, evaluation, run
from nss_prune.core.outputs import class_scores
from nss_prune.errors import ArgumentError, ModelMismatchError


def soft_loss(scores: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T² KL(softmax(t / T) ‖ softmax(s / T)), the mean over samples (Hinton et al. 2015, sec. 2).

    Args:
        scores: Of the student, ``[samples, classes, ...]``.
        wanted: Of the teacher, of the same shape.
        temperature: T, above 0.
    """
    found = log_softmax(as_computed(scores) / temperature, 1)
    aimed = log_softmax(as_computed(wanted) / temperature, 1)
    divergences = kl_div(found, aimed, reduction="none", log_target=True).sum(1)
    return temperature**2 * divergences.mean()


def similarity_loss(features: Tensor, wanted: Tensor) -> Tensor:
    """‖G̃_t − G̃_s‖² / b² of the Gram matrices of a batch (Tung and Mori 2019, Eq. 4).

    G = Q Qᵀ of the features Q ``[b, ...]``, flattened, G̃ with rows of norm 1: what is compared is
    which samples are alike, so that student and teacher may be of different width.
    """
    grams = []
    for each in (features, wanted):
        flat = as_computed(each).flatten(1)
        grams.append(normalize(flat @ flat.T, dim=1))
    return (grams[0] - grams[1]).square().sum() / len(features) ** 2


@dataclass(frozen=True)
class Distillation:
    """How a student learns from a teacher.

    L = (1 − weight) L(labels) + weight T² KL(teacher ‖ student) + features mean_l similarity_l.

    Attributes:
        teacher: The whole model, on the device of the student. Nothing of it changes.
        weight: Of the teacher's outputs, in [0, 1]; with 1 no labels are needed.
        temperature: T, above 0.
        features: Weight of :func:`similarity_loss`, the mean over the consumers' inputs; 0 or more.

    Raises:
        ArgumentError: One is outside what it may be.
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 2.0
    features: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ArgumentError(f"distillation is {self.weight}; give a weight in [0, 1]")
        if not self.temperature > 0:
            raise ArgumentError(f"temperature is {self.temperature}; give a number above 0")
        if not self.features >= 0:
            raise ArgumentError(f"features is {self.features}; give a weight of 0 or more")

    def consumers(self, student: nn.Module) -> list[str]:
        """Layers that receive fewer channels than those of the teacher; none without ``features``.

        Raises:
            ModelMismatchError: There is none to compare, or the teacher lacks a layer.
        """
        if not self.features:
            return []
        layers = dict(self.teacher.named_modules())
        found = []
        for name, layer in student.named_modules():
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() < 2:
                continue
            if name not in layers:
                raise ModelMismatchError(
                    f"the teacher has no layer {name!r}; give the model before it was pruned, or "
                    "features=0"
                )
            if weight.shape[1] < layers[name].weight.shape[1]:
                found.append(name)
        if not found:
            raise ModelMismatchError(
                "no layer of the model receives fewer channels than that of the teacher; give the "
                "model before it was pruned, or features=0"
            )
        return found

    @torch.no_grad()
    def targets(
        self, inputs: Any, number: int, consumers: list[str]
    ) -> tuple[Tensor, list[Tensor]]:
        """What the teacher gives for a batch, and what its consumers receive."""
        received: dict[str, Tensor] = {}
        with evaluation(self.teacher), receiving(self.teacher, consumers, received):
            scores = class_scores(run(self.teacher, inputs, number))
        return scores, [received[name] for name in consumers]

    def check(self, student: nn.Module) -> None:
        """Refuse a teacher elsewhere, or one that is the student.

        Raises:
            ArgumentError: Says what to do.
        """
        if self.teacher is student:
            raise ArgumentError(
                "the teacher is the model itself; give a copy made before it was pruned: "
                "copy.deepcopy(model)"
            )
        if device_of(self.teacher) != device_of(student):
            raise ArgumentError(
                f"the teacher is on {device_of(self.teacher)}, the model on {device_of(student)}; "
                "move it: teacher.to(device)"
            )


@contextlib.contextmanager
def receiving(
    model: nn.Module, layers: Sequence[str], received: dict[str, Tensor]
) -> Iterator[None]:
    """Within the context, the input of some layers is kept at each of their calls."""

    def keeping(name: str) -> Any:
        def keep(_: nn.Module, value: Tensor) -> None:
            received[name] = value

        return keep

    hooks = [
        (functools.partial(on_input, model.get_submodule(name)), keeping(name)) for name in layers
    ]
    with attached(*hooks):
        yield
