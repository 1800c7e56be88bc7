"""What a training trains, and how a step of it is made: the parts that differ between trainings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
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

    @contextlib.contextmanager
    def attach(self) -> Iterator[None]:
        """Within the context, the training takes place."""
        yield

    def begin(self) -> None:
        """Called before each epoch: a checkpoint or the validation may have changed the model."""

    @contextlib.contextmanager
    def gradients(self) -> Iterator[None]:
        """Within the context, a batch goes forward and backward."""
        yield

    def parameters(self) -> Iterable[nn.Parameter]:
        """All whose gradients count."""
        return self.model.parameters()

    def stepped(self) -> None:
        """Called after each step of the optimiser."""

    @contextlib.contextmanager
    def result(self) -> Iterator[None]:
        """Within the context, the model has the values that count, for its validation."""
        yield

    def finish(self) -> None:
        """Give the model the values that count."""
