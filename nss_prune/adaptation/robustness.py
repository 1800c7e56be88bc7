"""How many samples a model gets right, with and without an attack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from nss_prune.adaptation.attacks import Attack, attacked
from nss_prune.adaptation.datasets import Data, Moved, Shuffled, on_device_of, with_labels
from nss_prune.adaptation.validation import Validation as Validation
from nss_prune.adaptation.validation import score_by
from nss_prune.core.nested import moved
from nss_prune.training.evaluation import accuracy as accuracy


class ModelWith(nn.Module):
    """A model with some values of its parameters and buffers, whatever it has now."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.values = values

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return functional_call(self.model, self.values, arguments, keywords)


class Attacked:
    """Batches of ((inputs, adversaries made for a model), labels), made anew in each pass.

    Args:
        batches: Of (inputs, labels) on the model's device.
    """

    def __init__(self, batches: Data, attack: Attack, model: nn.Module) -> None:
        self.batches = batches
        self.attack = attack
        self.model = model

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for inputs, labels in self.batches:
            yield (inputs, attacked(self.attack, self.model, inputs, labels)), labels


def attacked_once(batches: Moved, attack: Attack, model: nn.Module) -> Moved:
    """The batches of :class:`Attacked`, made now, kept on the CPU, in another order each pass."""
    kept = [moved(batch, "cpu") for batch in Attacked(batches, attack, model)]
    return Moved(Shuffled(kept), batches.device)


def adversaries_of(batches: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """(adversaries, labels) of batches of ((inputs, adversaries), labels)."""
    return ((adversaries, labels) for (_, adversaries), labels in batches)


def evaluate_attack(
    model: nn.Module,
    data: Data,
    attack: Attack | None,
    *,
    made_for: nn.Module | None = None,
) -> float:
    """Share of samples that a model gets right under attack, over all processes, in [0, 1].

    Args:
        data: Batches of (inputs, labels).
        attack: None for the samples as they are.
        made_for: The model for which the adversaries are made; ``model`` itself by default.

    Raises:
        DataError: There are no samples, or the model or the attack refuses them.
    """
    batches: Data = on_device_of(model, data, with_labels)
    if attack is not None:
        batches = adversaries_of(Attacked(batches, attack, made_for or model))
    return accuracy(model, batches)


def validation_metrics(
    model: nn.Module, validation: Validation, attack: Attack | None
) -> dict[str, float]:
    """The score, larger for better: the mean of the accuracies, or what a function gives.

    With "accuracy" of the samples as they are, and "attacked" of those attacked anew.

    Raises:
        DataError: As :func:`evaluate_attack`.
    """
    if callable(validation):
        return {"score": score_by(validation, model)}
    clean = evaluate_attack(model, validation, None)
    if attack is None:
        return {"accuracy": clean, "score": clean}
    found = evaluate_attack(model, validation, attack)
    return {"accuracy": clean, "attacked": found, "score": (clean + found) / 2}
