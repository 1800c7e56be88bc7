"""Training part of a model: its critical neurons, or all the others."""

from __future__ import annotations

from nss_prune.adaptation.attacks import FGSM, PGD, make_attack
from nss_prune.adaptation.freezing import (
    Freezing,
    critical_channels,
    critical_entries,
    train_critical,
    train_others,
)
from nss_prune.adaptation.incremental import IncrementalTrainer
from nss_prune.adaptation.isolation import isolated_part
from nss_prune.adaptation.readapt import ReadaptResult, ReadaptTrainer, evaluate_attack
from nss_prune.adaptation.tasks import Task

__all__ = [
    "FGSM",
    "PGD",
    "Freezing",
    "IncrementalTrainer",
    "ReadaptResult",
    "ReadaptTrainer",
    "Task",
    "critical_channels",
    "critical_entries",
    "evaluate_attack",
    "isolated_part",
    "make_attack",
    "train_critical",
    "train_others",
]
