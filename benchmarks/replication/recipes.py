"""How long, and in which batches, the six settings train.

On a GPU batches are large enough to keep it busy, and the number of epochs is what the accuracy
needs; on a CPU the epochs are the same, in the setting's own batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.common.settings import Setting


@dataclass(frozen=True)
class Schedule:
    """Epochs of training, and the samples of a step on a GPU (None: the setting's own)."""

    epochs: int
    batch: int | None = None


SCHEDULES = {
    "alexnet-cifar10": Schedule(30, 512),
    "vgg16-cifar10": Schedule(30, 512),
    "resnet101-cifar10": Schedule(20, 512),
    "vgg19-imagenet10": Schedule(60),
}


def schedule_of(setting: Setting, device: str, epochs: int | None) -> Schedule:
    """That of a setting on a device; ``epochs`` replaces those of the schedule."""
    usual = SCHEDULES.get(setting.name, Schedule(setting.recipe.epochs))
    large = usual.batch if torch.device(device).type == "cuda" else None
    return Schedule(usual.epochs if epochs is None else epochs, large)


def scheduled(setting: Setting, device: str, epochs: int | None) -> Setting:
    """The setting as it trains on a device."""
    schedule = schedule_of(setting, device, epochs)
    return setting.with_epochs(schedule.epochs).with_batch(schedule.batch)
