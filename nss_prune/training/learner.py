"""What a training trains, and how a step of it is made: the parts that differ between trainings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


class Learner:
    """A model, its optimiser, and the loss of a batch; all else is the loop's.

    Args:
        model: It trains in place.
        optimizer: Of its parameters, or of what stands for them.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def loss(self, batch: Any, number: int) -> Tensor:
        """The loss of what :meth:`prepare` made of a batch, in mixed precision if that is on.

        Args:
            number: Of the batch, for messages.
        """
        raise NotImplementedError

    def prepare(self, batch: Any) -> Any:
        """What :meth:`loss` takes, made of a batch on the model's device, in full precision."""
        return batch

    def attach(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, the training takes place."""
        return contextlib.nullcontext()

    def begin(self) -> None:
        """Called before each epoch: a checkpoint or the validation may have changed the model."""

    def gradients(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, a batch goes forward and backward."""
        return contextlib.nullcontext()

    def parameters(self) -> Iterable[nn.Parameter]:
        """All whose gradients count."""
        return self.model.parameters()

    def stepped(self) -> None:
        """Called after each step of the optimiser."""

    def result(self) -> contextlib.AbstractContextManager[None]:
        """Within the context, the model has the values that count, for its validation."""
        return contextlib.nullcontext()

    def finish(self) -> None:
        """Give the model the values that count."""
