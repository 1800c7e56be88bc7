"""What the passes over the data may take, keep and show."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nss_prune.core.batches import length
from nss_prune.core.checkpoint import Checkpoint
from nss_prune.core.checkpoint import Records as Records
from nss_prune.errors import ArgumentError
from nss_prune.pruner.schedule import BACKWARD as BACKWARD
from nss_prune.pruner.schedule import Stage as Stage
from nss_prune.statistics.memory import MEMORY_LIMIT


@dataclass(frozen=True)
class Upkeep:
    """What the passes over the data may take, keep and show.

    Attributes:
        progress: Show a progress bar; None for only on a terminal.
        memory_limit: Bytes for the sums of a pass; where all take more there are several.
        checkpoint: Keeps the sums of finished passes.
        forward_dtype: Of the forward calls, torch.bfloat16 or None for the model's own.

    Raises:
        ArgumentError: The limit is not above 0, or the dtype is another one.
    """

    progress: bool | None = None
    memory_limit: float = MEMORY_LIMIT
    checkpoint: Checkpoint | None = None
    forward_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not self.memory_limit > 0:
            raise ArgumentError(
                f"memory_limit is {self.memory_limit!r}; give a number of bytes above 0"
            )
        if self.forward_dtype not in (None, torch.bfloat16):
            raise ArgumentError(
                f"forward_dtype is {self.forward_dtype!r}; give torch.bfloat16, or None for the "
                "model's own (gradients in float16 would need a loss that is scaled)"
            )

    @classmethod
    def of(
        cls,
        progress: bool | None,
        limit: float,
        folder: str | os.PathLike[str] | None,
        dtype: torch.dtype | None = None,
    ) -> Upkeep:
        """With a checkpoint in a folder, where there is one."""
        return cls(progress, limit, None if folder is None else Checkpoint(folder), dtype)

    def recalled(
        self,
        name: str,
        model: nn.Module,
        data: Iterable[Any] | None,
        asked: Any,
        kinds: Mapping[str, Callable[..., Any]],
        make: Callable[[], Records],
    ) -> Records:
        """The sums of a finished pass, from the checkpoint where it has them.

        Args:
            name, model, kinds, make: As :meth:`nss_prune.core.checkpoint.Checkpoint.records`.
            data: Of which only the number of batches is known beforehand.
            asked: What else the sums depend on.
        """
        if self.checkpoint is None:
            return make()
        batches = None if data is None else length(data)
        wanted = (batches, asked, self.forward_dtype)
        return self.checkpoint.records(name, model, wanted, kinds, make)


DEFAULT = Upkeep()
