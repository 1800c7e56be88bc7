"""Re-adaptation: the critical neurons of a model learn new samples, adversarial ones or others."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from nss_prune.adaptation.adversarial_training import AdversarialTraining
from nss_prune.adaptation.attacks import Attack, PerChannel, make_attack
from nss_prune.adaptation.checkpoint import Checkpoint
from nss_prune.adaptation.course import Course
from nss_prune.adaptation.datasets import Data, on_device_of, repeatable, with_labels
from nss_prune.adaptation.freezing import Freezing, train_all, train_critical
from nss_prune.adaptation.robustness import (
    ModelWith,
    Validation,
    accuracy,
    adversaries_of,
    attacked_once,
    evaluate_attack,
    validation_score,
)
from nss_prune.adaptation.training import Loss, OptimizerFactory, make_optimizer, make_scheduler
from nss_prune.core.processes import copy_from_first
from nss_prune.core.undo import put_back, restored_on_error
from nss_prune.errors import ArgumentError
from nss_prune.graph.slices import Slice

__all__ = ["ReadaptResult", "ReadaptTrainer", "Validation", "evaluate_attack"]


@dataclass(frozen=True)
class ReadaptResult:
    """What a re-adaptation came to.

    Attributes:
        tpr: Share of the model's parameters that trained (training parameter rate).
        ra: Share of the new samples that the re-adapted model gets right: of adversaries made
            for the model as it was before, or of the samples themselves without an attack.
        raa: Share of samples that it gets right when it is attacked anew; None without an attack.
        seconds: Time spent on training, attacks within it included.
        losses: Mean loss of each epoch, L = CE(x) + CE(x').
        scores: Validation score after each epoch, if there was a validation.
    """

    tpr: float
    ra: float
    raa: float | None
    seconds: float
    losses: tuple[float, ...]
    scores: tuple[float, ...]


class ReadaptTrainer:
    """Train the critical neurons on new samples and their adversaries; all others keep their bits.

    Under torchrun, gradients are averaged over the processes; each of them needs its own part of
    the data, of the same number of batches (as a DistributedSampler gives).

    Args:
        model: The model, not wrapped; on any device. Its mode and flags stay as they are.
        slice: Its critical neurons. None where ``train`` does not need it.
        attack: "fgsm" or "pgd" with ``epsilon`` and ``normalization``; any function of (model,
            inputs, labels), such as ``PGD(0.3, steps=40, step_size=0.01)``; None to learn the
            samples as they are.
        epsilon: Strength of an attack by name, in the units of the inputs before normalising.
        normalization: Mean and standard deviation that the inputs went through, per channel.
        adversaries: "fresh" ones for the model as it is at each step, or "fixed" ones, made once
            for the model as it was before (and kept in memory with the data).
        train: "critical" neurons, "all" of the model, or a freezing of one's own.
        optimizer: A name that timm knows, an optimiser of the model's parameters, or a function
            of the list of those that train.
        learning_rate: For an optimiser by name, as ``momentum`` and ``weight_decay`` are, from
            which biases and norms are exempt.
        scheduler: A name that timm knows ("cosine", "step", ...), or None.
        epochs: How often the data is gone through.
        loss: Function of (outputs, labels), one value or one for each sample; cross entropy by
            default.
        amp: torch.bfloat16 or torch.float16 for mixed precision. Attacks stay in full precision.
        clip_norm: Largest norm of the gradient of all that trains.
        patience: Epochs without a better validation score after which training stops. The model
            then gets its best values back.
        checkpoint: A file that is written after each epoch.
        resume: Whether to go on from the checkpoint if it is there.
        progress: Whether to show a bar; by default in a terminal.

    Attributes:
        freezing: What trains.
        optimizer: The optimiser in use. One that was made here, by name or by a function, has
            parameters of its own in place of those of which only a block of rows and columns
            trains.

    Raises:
        ArgumentError: An argument is outside what it may be.
        ModelMismatchError: The slice is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        slice: Slice | None,
        attack: Literal["fgsm", "pgd"] | Attack | None = "fgsm",
        epsilon: PerChannel = 8 / 255,
        *,
        normalization: tuple[PerChannel, PerChannel] | None = None,
        adversaries: Literal["fresh", "fixed"] = "fresh",
        train: Literal["critical", "all"] | Freezing = "critical",
        optimizer: str | Optimizer | OptimizerFactory = "sgd",
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        scheduler: str | None = None,
        epochs: int = 10,
        loss: Loss | None = None,
        amp: torch.dtype | None = None,
        clip_norm: float | None = None,
        patience: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        progress: bool | None = None,
    ) -> None:
        _check_choices(adversaries, amp, clip_norm)
        _check_counts(epochs=epochs, patience=1 if patience is None else patience)
        if resume and checkpoint is None:
            raise ArgumentError("resume=True needs the file to go on from; give checkpoint=")
        self.model = model
        self.attack = None if attack is None else make_attack(attack, epsilon, normalization)
        self.adversaries = adversaries
        self.freezing = _freezing(train, slice, model)
        self.optimizer = make_optimizer(
            self.freezing,
            optimizer,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
        )
        self._training = AdversarialTraining(
            self.freezing,
            self.optimizer,
            # Not in an optimiser made elsewhere, whose parameters may be known there.
            in_blocks=not isinstance(optimizer, Optimizer),
            attack=self.attack,
            fixed=adversaries == "fixed",
            loss=loss,
            amp=amp,
            clip_norm=clip_norm,
            progress=progress,
        )
        self.scheduler = make_scheduler(scheduler, self.optimizer, epochs)
        self.epochs = epochs
        self.patience = patience
        # Frozen entries are compared besides: the same number of others are the same ones.
        size = self._training.blocks.size
        purpose = {"entries in blocks": size} if size else {}
        self._checkpoint = Checkpoint(checkpoint, self.freezing, self.optimizer, purpose)
        self.resume = resume
        self._result: ReadaptResult | None = None

    @property
    def result(self) -> ReadaptResult:
        """What :meth:`fit` came to.

        Raises:
            ArgumentError: It was not called, or did not end.
        """
        if self._result is None:
            raise ArgumentError("there is no result yet; call fit(data) first")
        return self._result

    def fit(self, data: Data, validation: Validation | None = None) -> ReadaptResult:
        """Train, in place.

        Args:
            data: Batches of (inputs, labels) that can be gone through repeatedly.
            validation: Such batches, on which the score is the mean of the accuracies with and
                without attack and ``raa`` is measured; or a function of the model that gives a
                score, larger for better.

        Raises:
            ArgumentError: There is ``patience`` but no validation.
            DataError: There are no batches, or the model or the attack refuses them.
            FileFormatError, ModelMismatchError: The checkpoint is damaged or of another model.
            NumericalError: The loss became NaN or infinite. Whatever is raised, the model and its
                optimiser are as they were before the call.
        """
        if self.patience is not None and validation is None:
            raise ArgumentError("patience needs something to watch; give fit(data, validation)")
        data = repeatable(data)
        self._result = None
        copy_from_first(self.model)
        with restored_on_error(self.model, values=True, optimizer=self.optimizer) as before:
            original = ModelWith(self.model, before)
            batches = self._batches(data, original)
            course = self._train(batches, validation)
            self._result = self._measure(batches, data, validation, original, course)
        return self._result

    def _batches(self, data: Data, original: nn.Module) -> Data:
        """The data, or ((inputs, adversaries), labels) if those are fixed."""
        batches = on_device_of(self.model, data, with_labels)
        if self.attack is None or self.adversaries == "fresh":
            return batches
        return attacked_once(batches, self.attack, original)

    def _train(self, batches: Data, validation: Validation | None) -> Course:
        with self._training.attach():
            course = Course.load(self._checkpoint) if self.resume else Course()
            while len(course.losses) < self.epochs and not course.is_over(self.patience):
                epoch = len(course.losses)
                if self.scheduler is not None:
                    self.scheduler.step(epoch, course.scores[-1] if course.scores else None)
                begin = time.perf_counter()
                loss = self._training.epoch(batches, epoch, f"epoch {epoch + 1}/{self.epochs}")
                course.seconds += time.perf_counter() - begin
                copy_from_first(self.model)
                score = (
                    None
                    if validation is None
                    else validation_score(self.model, validation, self.attack)
                )
                course.add(loss, score, self.model, self.patience)
                course.save(self._checkpoint)
            if course.best is not None:
                put_back(self.model, course.best)
        self.optimizer.zero_grad()
        return course

    def _measure(
        self,
        batches: Data,
        data: Data,
        validation: Validation | None,
        original: nn.Module,
        course: Course,
    ) -> ReadaptResult:
        again = data if validation is None or callable(validation) else validation
        ra = (
            accuracy(self.model, adversaries_of(batches))
            if self.attack is not None and self.adversaries == "fixed"
            else evaluate_attack(self.model, data, self.attack, made_for=original)
        )
        return ReadaptResult(
            tpr=self.freezing.share,
            ra=ra,
            raa=None if self.attack is None else evaluate_attack(self.model, again, self.attack),
            seconds=course.seconds,
            losses=tuple(course.losses),
            scores=tuple(course.scores),
        )


def _check_choices(adversaries: str, amp: torch.dtype | None, clip_norm: float | None) -> None:
    if adversaries not in ("fresh", "fixed"):
        raise ArgumentError(f"adversaries is {adversaries!r}; use 'fresh' or 'fixed'")
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ArgumentError(f"amp is {amp!r}; use torch.bfloat16, torch.float16 or None")
    if clip_norm is not None and not clip_norm > 0:
        raise ArgumentError(f"clip_norm is {clip_norm!r}; give a number above 0, or None")


def _check_counts(**counts: int) -> None:
    for name, number in counts.items():
        if not isinstance(number, int) or number < 1:
            raise ArgumentError(f"{name} is {number!r}; give 1 or more")


def _freezing(
    train: Literal["critical", "all"] | Freezing, critical: Slice | None, model: nn.Module
) -> Freezing:
    if isinstance(train, Freezing):
        if train.model is not model:
            raise ArgumentError("train is a Freezing of another model; make one of this model")
        return train
    if train == "all":
        return train_all(model)
    if train != "critical":
        raise ArgumentError(f"train is {train!r}; use 'critical', 'all' or a Freezing")
    if critical is None:
        raise ArgumentError(
            "train='critical' needs a slice; pass profile(model, data).slice(theta), or train='all'"
        )
    return train_critical(critical, model)
