"""What the outputs of the model mean in a pass, asked for the first batch that it matters for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import Forward
from nss_prune.core.output_inference import Labels
from nss_prune.core.outputs import Outputs, OutputsSpec, resolve_outputs, with_units
from nss_prune.errors import NumericalError
from nss_prune.profiling.contributions.deeplift import target_scores

Loss = Callable[[Any, Any], Tensor]


Meaning = Callable[[Any, Any], Outputs]
"""Function of the outputs and labels of a batch that says what the outputs mean."""


def by_labels(outputs: Any, labels: Any) -> Outputs:
    """What outputs mean by their own shapes and labels."""
    return resolve_outputs(None, outputs, labels)


def by_batch(model: nn.Module, data: Iterable[Any], spec: OutputsSpec, forward: Forward) -> Meaning:
    """What the outputs mean by one batch, in units of all data where it can be read again."""

    def meaning(outputs: Any, labels: Any) -> Outputs:
        found = resolve_outputs(spec, outputs, labels)
        # The workers of a loader that keeps them cannot begin anew while a pass goes on.
        kept = getattr(getattr(data, "data", data), "persistent_workers", False)
        return found if kept else with_units(found, spec, model, data, forward)

    return meaning


class Described:
    """The outputs of a pass, as what they mean.

    Args:
        loss: Function of (outputs, labels); by default the likelihood of the labels by what the
            outputs mean.
        meaning: What the outputs mean, asked for the first batch, and only where it matters.
    """

    def __init__(self, loss: Loss | None = None, meaning: Meaning = by_labels) -> None:
        self._given = loss
        self._meaning = meaning
        self._outputs: Outputs | None = None

    def outputs(self, outputs: Any, labels: Any) -> Outputs:
        """What the outputs mean, by the first batch that is asked for."""
        if self._outputs is None:
            self._outputs = self._meaning(outputs, labels)
        return self._outputs

    def predictions(self, outputs: Any, labels: Any) -> Any:
        """The class that the model predicts for each sample."""
        return self.outputs(outputs, labels).predictions(outputs)

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """The loss of a batch, summed.

        Raises:
            NumericalError: It is NaN or infinite.
        """
        loss = self._given or self.outputs(outputs, labels).loss
        value = loss(outputs, labels).sum()
        if not torch.isfinite(value):
            raise NumericalError(
                f"the loss is {value.item()}; check the data and the model's weights for NaN"
            )
        return value

    def explained(self, outputs: Any, labels: Any, samples: int) -> Tensor:
        """What metrics with a reference explain: classes, or all outputs together.

        Outputs are of the samples and their references.
        """
        if not self.explains_meaning(labels):
            return target_scores(outputs, None, samples)
        return self.outputs(outputs, labels).explained(outputs, labels, samples)

    def explains_meaning(self, labels: Any) -> bool:
        """Whether what is explained depends on what the outputs mean."""
        if self._given is None:
            return True
        whole = Labels(labels).whole()
        return whole is not None and not whole.is_floating_point()
