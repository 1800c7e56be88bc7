"""Gradual pruning as a callback of Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from nss_prune.core.models import submodule
from nss_prune.errors import ArgumentError
from nss_prune.integrations.gradual import GradualPruning

try:
    from lightning.pytorch.callbacks import Callback  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(
        "nss_prune.integrations.lightning needs Lightning: pip install 'nss_prune[lightning]'"
    ) from error


class PruningCallback(Callback):  # type: ignore[misc]
    """Prunes a module of the LightningModule at some steps of the training.

    ::

        gradual = GradualPruning(example_inputs, {100: 0.8, 200: 0.6}, data=batches)
        Trainer(callbacks=[PruningCallback(gradual)]).fit(module, loader)

    Args:
        gradual: When and how.
        name: Of the module, an attribute of the LightningModule; "" for all of it.

    Raises:
        ArgumentError: In training, with several optimisers or processes.
        ModelMismatchError: In training, there is no such module.
    """

    def __init__(self, gradual: GradualPruning, name: str = "model") -> None:
        self.gradual = gradual
        self.name = name

    def on_train_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune where the schedule says so."""
        if len(trainer.optimizers) != 1:
            raise ArgumentError(
                f"PruningCallback follows one optimiser, there are {len(trainer.optimizers)}; call "
                "GradualPruning.after_step in training_step for each model and its optimiser"
            )
        model = submodule(pl_module, self.name)
        self.gradual.after_step(trainer.global_step, model, trainer.optimizers[0])
