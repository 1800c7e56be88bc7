"""Gradual pruning as a callback of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from nss_prune.integrations.gradual import GradualPruning

try:
    from transformers import TrainerCallback  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(
        "nss_prune.integrations.transformers needs transformers and accelerate: pip install "
        "'nss_prune[transformers]'"
    ) from error


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Prunes the model at some steps of the training.

    ::

        gradual = GradualPruning({"input_ids": ids}, {100: 0.8, 200: 0.6}, data=batches)
        Trainer(model, arguments, train_dataset=data, callbacks=[PruningCallback(gradual)]).train()

    A checkpoint of Trainer holds the smaller model and cannot be resumed into the whole one: save
    it by :func:`nss_prune.save_pruned`.

    Args:
        gradual: When and how.
    """

    def __init__(self, gradual: GradualPruning) -> None:
        self.gradual = gradual

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune where the schedule says so."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        # accelerate wraps the optimiser; its parameters are those of the one inside.
        inner = getattr(optimizer, "optimizer", optimizer)
        self.gradual.after_step(state.global_step, model, inner)
