"""Incremental development as a plugin of Avalanche's supervised strategies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from nss_prune.adaptation.incremental import IncrementalTrainer
from nss_prune.errors import ArgumentError

try:
    from avalanche.training.plugins import SupervisedPlugin  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(
        "nss_prune.adaptation.avalanche needs Avalanche: pip install 'nss_prune[avalanche]'"
    ) from error


class NeuSemSlicePlugin(SupervisedPlugin):  # type: ignore[misc]
    """Experiences after the first train only what is not critical to those before.

    ::

        strategy = Naive(model, optimizer, criterion, plugins=[NeuSemSlicePlugin()])

    An experience is evaluated with the mask of its task, the last one learned with the whole
    network; test experiences of which no training experience has the number (joint test streams)
    with the whole network too. The first experience may be learned by any training; without
    replay, the scores of each under its mask are bit-identical for good.

    Args:
        loss: What the outputs compete with in training: "task", the classes of the experience
            alone; "all", all others too, as replay plugins need it.
        **trainer_arguments: As :class:`IncrementalTrainer` takes them, ``model``, ``slice``,
            ``data`` and ``grow`` excepted. The model has all outputs from the beginning, or adapts
            itself; it must not take task labels.

    Attributes:
        trainer: After the first experience, with ``tasks`` and ``infer_task``.

    Raises:
        ArgumentError: ``loss`` is neither.
        NSSPruneError: In training, as :class:`IncrementalTrainer`.
    """

    def __init__(self, loss: Literal["task", "all"] = "task", **trainer_arguments: Any) -> None:
        super().__init__()
        if loss not in ("task", "all"):
            raise ArgumentError(f"loss is {loss!r}; use 'task' or 'all'")
        self.loss = loss
        self.trainer_arguments = trainer_arguments
        self.trainer: IncrementalTrainer | None = None
        self._learned: list[int] = []
        self._training = contextlib.ExitStack()
        self._inference = contextlib.ExitStack()

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Freeze what is critical to earlier experiences."""
        self._training.close()  # of a training that was interrupted
        if self.trainer is not None:
            inputs = next(iter(_Batches(strategy)))[0].to(strategy.device)
            freezing = self.trainer.freezing(inputs)
            self._training.enter_context(freezing.attach(strategy.optimizer))

    def after_forward(self, strategy: Any, **_: Any) -> None:
        """Leave the classes of the experience in the outputs."""
        if self.loss == "task":
            strategy.mb_output = _only(strategy.mb_output, _classes(strategy))

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """Find the critical neurons of the experience."""
        self._training.close()
        number = strategy.experience.current_experience
        data = _Batches(strategy)
        if self.trainer is None:
            self.trainer = IncrementalTrainer(
                strategy.model, data=data, grow=False, **self.trainer_arguments
            )
        else:
            self.trainer.add(data)
        self._learned.append(number)

    def before_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Use the neurons of the experience's task."""
        self._inference.close()
        number = getattr(strategy.experience, "current_experience", None)
        if self.trainer is not None and number in self._learned:
            task = self.trainer.task(self._learned.index(number))
            self._inference.enter_context(task)

    def after_eval_exp(self, strategy: Any, **_: Any) -> None:
        """Use the whole network again."""
        self._inference.close()


class _Batches:
    """(inputs, labels) of the experience that a strategy trains on, in order, as often as asked."""

    def __init__(self, strategy: Any) -> None:
        self.dataset = strategy.experience.dataset.eval()
        self.size = strategy.train_mb_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        collate = getattr(self.dataset, "collate_fn", None)
        for batch in DataLoader(self.dataset, batch_size=self.size, collate_fn=collate):
            yield batch[0], batch[1]


def _classes(strategy: Any) -> list[int]:
    return sorted(strategy.experience.classes_in_this_experience)


def _only(outputs: Tensor, classes: list[int]) -> Tensor:
    """The outputs with −∞ for all other classes, ``[samples, classes]``."""
    others = torch.ones(outputs.shape[1], dtype=torch.bool, device=outputs.device)
    others[classes] = False
    return outputs.masked_fill(others, float("-inf"))
