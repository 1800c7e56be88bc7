"""A model for some of its classes: their outputs, and a head with their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nss_prune.compensation.eligible import shared_weights
from nss_prune.core.classifier import find_classifier_by_shift, outputs_of
from nss_prune.core.models import evaluation, submodule
from nss_prune.core.outputs import class_scores
from nss_prune.core.undo import Snapshot
from nss_prune.errors import ArgumentError
from nss_prune.graph.slices import Slice
from nss_prune.pruner.class_samples import remark
from nss_prune.pruner.repair import Repaired
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject

KEPT_CLASSES = "kept_classes"
"""Attribute of a head whose other rows are gone: the class of each of its outputs."""


@dataclass(frozen=True)
class ClassScores:
    """Function of a model's outputs: the scores of some classes, ``[samples, classes, ...]``.

    A head that has their rows alone gives them as they are.
    """

    classes: tuple[int, ...]

    def __call__(self, outputs: Any) -> Tensor:
        scores = class_scores(outputs)
        if scores.shape[1] == len(self.classes):
            return scores
        return scores[:, list(self.classes)]


@dataclass(frozen=True)
class Classes:
    """The classes that the smaller model is for.

    Attributes:
        kept: In the order of its outputs.
        keep_head: Keep all rows of the head.
    """

    kept: tuple[int, ...]
    keep_head: bool = False

    def head(self, subject: Subject) -> ClassHead:
        """Where their scores are made.

        Raises:
            ArgumentError: The model has no such classes, or its head's rows are not the classes.
        """
        model, inputs = subject.model, subject.example_inputs
        with evaluation(model), torch.no_grad():
            scores = class_scores(subject.forward(model, inputs))
        classes = scores.shape[1]
        if not all(0 <= kept < classes for kept in self.kept) or len(self.kept) >= classes:
            raise ArgumentError(
                f"classes is {list(self.kept)}, and the model has {classes} classes, 0 to "
                f"{classes - 1}; give fewer than all of them"
            )
        if self.keep_head:
            return ClassHead("", self.kept, classes)
        name = find_classifier_by_shift(model, inputs, forward=subject.forward)
        layer: Any = None if name is None else submodule(model, name)
        if name is None or getattr(layer, "groups", 1) > 1 or id(layer.weight) in shared_weights(
            model
        ):  # fmt: skip
            raise ArgumentError(
                "classes= drops rows of the layer that makes the class scores, and there is none "
                "whose rows are these scores and nothing else; give keep_head=True"
            )
        return ClassHead(name, self.kept, classes)


def find_classes(
    classes: Sequence[int] | None, keep_head: bool, data: Any, **others: Any
) -> Classes | None:
    """What NSSPruner's arguments ask for; None for all classes.

    Args:
        others: Arguments that contradict it where they are not None.

    Raises:
        ArgumentError: They contradict each other, or the classes are none.
    """
    if classes is None:
        if keep_head:
            raise ArgumentError("keep_head=True goes with classes=; give both or none")
        return None
    kept = tuple(classes)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in kept):
        raise ArgumentError(f"classes is {classes!r}; give the numbers of the classes to keep")
    if len(kept) < 2 or len(set(kept)) < len(kept):
        raise ArgumentError(f"classes is {list(kept)}; give at least two classes, each once")
    if data is None:
        raise ArgumentError("classes= picks samples by their labels: give data= with labels")
    for name, value in others.items():
        if value is not None:
            raise ArgumentError(
                f"{name}= is about all classes, and classes= about some; leave one of them out"
            )
    return Classes(kept, bool(keep_head))


@dataclass(frozen=True)
class ClassHead:
    """The layer that makes the class scores: a repair that drops the rows of other classes.

    Attributes:
        before_removal: Nothing is left to do after the removal.
        name: Of the layer; "" where all its rows stay.
        kept: The classes, in the order of the outputs.
        classes: How many the model had.
        data: That calibrates.
    """

    before_removal: ClassVar = True
    name: str
    kept: tuple[int, ...]
    classes: int
    data: Any = None

    @property
    def outputs(self) -> dict[int, int]:
        """Class -> the output that has its score."""
        return {kept: position if self.name else kept for position, kept in enumerate(self.kept)}

    @property
    def note(self) -> str:
        """For the report."""
        places = ", ".join(f"{kept} -> {place}" for kept, place in self.outputs.items())
        others = self.classes - len(self.kept)
        what = f"rows of {self.name} are dropped" if self.name else "mean nothing any more"
        return f"class -> output: {places}; the {others} others {what}{remark(self.data)}"

    def observe(self, subject: Subject, evidence: Evidence) -> None:
        """Nothing: the rows are known."""

    def before(self, subject: Subject, chosen: Slice, seen: None) -> Repaired:
        """Drop the rows, where they are still there."""
        self._drop(subject.model)
        return Repaired()

    def after(self, subject: Subject, chosen: Slice, seen: None) -> Repaired:
        """Nothing more."""
        return Repaired()

    @contextlib.contextmanager
    def dropped(self, model: nn.Module) -> Iterator[None]:
        """Within the context the rows are gone."""
        before = Snapshot(model)
        try:
            self._drop(model)
            yield
        finally:
            before.restore()

    def _drop(self, model: nn.Module) -> None:
        if not self.name or outputs_of(model, self.name) == len(self.kept):
            return
        layer: Any = submodule(model, self.name)
        rows = torch.tensor(self.kept)
        for key in ("weight", "bias"):
            old = getattr(layer, key)
            if old is not None:
                new = old.detach()[rows.to(old.device)].clone()
                setattr(layer, key, nn.Parameter(new, old.requires_grad))
        for width in ("out_features", "out_channels"):
            if hasattr(layer, width):
                setattr(layer, width, len(self.kept))
        if getattr(model, "num_classes", None) == self.classes:
            vars(model)["num_classes"] = len(self.kept)
        setattr(layer, KEPT_CLASSES, self.kept)
