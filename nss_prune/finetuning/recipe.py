"""What fine-tuning adds to a training: a teacher's weights, mixed samples, averaged parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from nss_prune.errors import ArgumentError
from nss_prune.finetuning.distillation import Distillation
from nss_prune.finetuning.mixing import Mixup, mixing_of
from nss_prune.training.settings import TrainingArguments


class FinetuneArguments(TrainingArguments, total=False):
    """The keywords of :class:`Recipe` and of a training, for type checkers and editors."""

    distillation: float
    temperature: float
    features: float
    mixup: float
    cutmix: float
    smoothing: float
    ema: float | None


@dataclass(frozen=True)
class Recipe:
    """What fine-tuning learns from.

    Attributes:
        distillation: Weight of the teacher's outputs beside the labels', in [0, 1].
        temperature: By which the scores of teacher and model are divided, above 0.
        features: Weight of what the layers receive that lost inputs: which samples are alike
            there, see :func:`nss_prune.finetuning.distillation.similarity_loss`.
        mixup, cutmix: Their α in timm's Mixup; 0 for none.
        smoothing: Of the labels, in [0, 1).
        ema: Decay in (0, 1) of an average of the parameters, which is what is validated and
            what the model has in the end; None for none.

    Raises:
        ArgumentError: ``ema`` is outside what it may be.
    """

    distillation: float = 0.5
    temperature: float = 2.0
    features: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 < self.ema < 1:
            raise ArgumentError(f"ema is {self.ema}; give a decay in (0, 1), such as 0.999")

    @staticmethod
    def taken_from(arguments: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
        """The recipe in some keywords, and the other ones."""
        others = dict(arguments)
        names = [field.name for field in fields(Recipe) if field.name in others]
        return Recipe(**{name: others.pop(name) for name in names}), others

    def taught_by(self, teacher: nn.Module | None, model: nn.Module) -> Distillation | None:
        """How the model learns from a teacher; None without one.

        Raises:
            ArgumentError: A weight is outside what it may be, or the teacher cannot teach.
        """
        if teacher is None:
            return None
        taught = Distillation(teacher, self.distillation, self.temperature, self.features)
        taught.check(model)
        return taught

    def mixing(self, classes: Callable[[], int]) -> Mixup | None:
        """How samples are mixed; None where they are not.

        Raises:
            ArgumentError: An argument is outside what it may be.
        """
        return mixing_of(self.mixup, self.cutmix, self.smoothing, classes)

    def identity(self, taught: Distillation | None) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        found = {**asdict(self), "teacher": taught is not None}
        if taught is None:
            for name in ("distillation", "temperature", "features"):
                del found[name]
        return found
