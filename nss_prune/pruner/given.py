"""What a pruner is given to look at: data, and what the outputs mean."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nss_prune.pruner.class_samples import of_classes
from nss_prune.pruner.classes import Classes, ClassHead, ClassScores, find_classes
from nss_prune.pruner.subject import Subject


@dataclass(frozen=True)
class Given:
    """The data of a pruner, and what the model's outputs mean: of all classes or of some.

    Attributes:
        data: Batches of (inputs, labels); None for the example inputs.
        outputs: See :data:`nss_prune.core.outputs.OutputsSpec`.
        classes: None for all of them.
    """

    data: Iterable[Any] | None
    outputs: Any
    classes: Classes | None = None

    @staticmethod
    def of(
        strategy: Any,
        classes: Sequence[int] | None,
        keep_head: bool,
        data: Iterable[Any] | None,
        outputs: Any,
        categories: Any,
        loss: Any,
        profile: Any,
    ) -> Given:
        """By NSSPruner's arguments.

        Args:
            strategy: All samples are of the classes unless it is "divergence", which reads no
                labels.

        Raises:
            ArgumentError: They contradict each other.
        """
        own = None if categories == "labels" else categories
        whole = {"outputs": outputs, "categories": own, "loss": loss, "profile": profile}
        found = find_classes(classes, keep_head, data, **whole)
        if found is None or data is None:
            return Given(data, outputs)
        samples = of_classes(data, found.kept, enough=strategy == "divergence")
        return Given(samples, ClassScores(found.kept), found)

    def head(self, subject: Subject) -> ClassHead | None:
        """Where the scores of some classes are made; None for all of them."""
        if self.classes is None:
            return None
        return replace(self.classes.head(subject), data=self.data)
