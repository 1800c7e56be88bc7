"""The course of a training: its losses and scores, when to stop, and its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from nss_prune.adaptation.checkpoint import Checkpoint
from nss_prune.core.schema import array, number, record
from nss_prune.core.undo import copied

_NOTES = record(
    {"losses": array(number()), "scores": array(number()), "seconds": number(0)},
)


@dataclass
class Course:
    """What happened so far.

    Attributes:
        losses: Mean loss of each epoch.
        scores: Validation score after each epoch, if there is a validation.
        seconds: Time spent on training.
        best: Parameters and buffers at the best score, if they are wanted.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    seconds: float = 0.0
    best: dict[str, Tensor] | None = None

    def add(self, loss: float, score: float | None, model: nn.Module, patience: int | None) -> None:
        """Another epoch. With ``patience``, the model's values are kept if it is the best."""
        is_best = score is not None and score > max(self.scores, default=float("-inf"))
        if patience is not None and is_best:
            self.best = copied(model)
        self.losses.append(loss)
        if score is not None:
            self.scores.append(score)

    def is_over(self, patience: int | None) -> bool:
        """Whether the best score is ``patience`` epochs old."""
        if patience is None or not self.scores:
            return False
        best = self.scores.index(max(self.scores))
        return len(self.scores) - 1 - best >= patience

    def save(self, checkpoint: Checkpoint) -> None:
        """Write it with what the training needs to go on."""
        notes = {"losses": self.losses, "scores": self.scores, "seconds": self.seconds}
        checkpoint.save(notes, self.best)

    @staticmethod
    def load(checkpoint: Checkpoint) -> Course:
        """What :meth:`save` wrote, model and optimiser included; a new course without a file.

        Raises:
            FileFormatError, ModelMismatchError: As :meth:`Checkpoint.load`.
        """
        found = checkpoint.load(_NOTES)
        if found is None:
            return Course()
        notes, best = found
        return Course(notes["losses"], notes["scores"], notes["seconds"], best)
