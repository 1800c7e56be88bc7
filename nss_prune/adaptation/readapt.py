"""Re-adaptation: the critical neurons of a model learn new samples, adversarial ones or others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from nss_prune.adaptation.attacks import Attack, PerChannel, attacked, make_attack
from nss_prune.adaptation.checkpoint import Checkpoint
from nss_prune.adaptation.datasets import Data, Moved, Shuffled, repeatable
from nss_prune.adaptation.freezing import Freezing, train_critical
from nss_prune.adaptation.partial_gradients import CompactTraining, cut_blocks
from nss_prune.adaptation.training import OptimizerFactory, count_correct, make_optimizer, one_pass
from nss_prune.core.models import device_of, run
from nss_prune.core.nested import map_tensors
from nss_prune.core.outputs import cross_entropy
from nss_prune.core.processes import agree, average_gradients, processes, total
from nss_prune.core.undo import copied, put_back, undone_on_failure
from nss_prune.errors import ArgumentError, DataError
from nss_prune.graph.slices import Slice
from nss_prune.profiling.accumulation import Loss

Validation = Data | Callable[[nn.Module], float]


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
        learning_rate: For an optimiser by name, as ``momentum`` and ``weight_decay`` (which spares
            biases and norms) are.
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
        if adversaries not in ("fresh", "fixed"):
            raise ArgumentError(f"adversaries is {adversaries!r}; use 'fresh' or 'fixed'")
        if amp not in (None, torch.bfloat16, torch.float16):
            raise ArgumentError(f"amp is {amp!r}; use torch.bfloat16, torch.float16 or None")
        if clip_norm is not None and not clip_norm > 0:
            raise ArgumentError(f"clip_norm is {clip_norm!r}; give a number above 0, or None")
        for name, number in (("epochs", epochs), ("patience", patience)):
            if number is not None and (not isinstance(number, int) or number < 1):
                raise ArgumentError(f"{name} is {number!r}; give 1 or more")
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
        # Not in an optimiser made elsewhere, whose parameters may be known there.
        own = not isinstance(optimizer, Optimizer)
        blocks = cut_blocks(self.freezing, self.optimizer) if own else {}
        read = clip_norm is not None or amp == torch.float16
        self._training = CompactTraining(self.freezing, self.optimizer, blocks, zero_gradients=read)
        self.scheduler = _scheduler(scheduler, self.optimizer, epochs)
        self.epochs = epochs
        self.loss: Loss = cross_entropy if loss is None else loss
        self.amp = amp
        self.clip_norm = clip_norm
        self.patience = patience
        # Frozen entries are compared besides: the same number of others are the same ones.
        purpose = {"entries in blocks": self._training.size} if blocks else {}
        self._checkpoint = Checkpoint(checkpoint, self.freezing, self.optimizer, purpose)
        self.resume = resume
        self.progress = progress
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
        agree(self.model)
        with undone_on_failure(self.model, self.optimizer) as before:
            original = _Original(self.model, before)
            batches = self._batches(data, original)
            course = self._train(batches, validation)
            self._result = self._measure(batches, data, validation, original, course)
        return self._result

    def _batches(self, data: Data, original: nn.Module) -> Data:
        """The data, or ((inputs, adversaries), labels) if those are fixed."""
        moved = Moved(data, device_of(self.model))
        if self.attack is None or self.adversaries == "fresh":
            return moved
        both = _Attacked(moved, self.attack, original)
        kept = [map_tensors(Tensor.cpu, batch) for batch in both]
        return Moved(Shuffled(kept), moved.device)

    def _train(self, batches: Data, validation: Validation | None) -> _Course:
        scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            device_of(self.model).type, enabled=self.amp == torch.float16
        )
        with self._training.attach():
            course = self._resumed()
            while len(course.losses) < self.epochs and not course.is_over(self.patience):
                epoch = len(course.losses)
                if self.scheduler is not None:
                    self.scheduler.step(epoch, course.scores[-1] if course.scores else None)
                begin = time.perf_counter()
                loss = self._epoch(batches, epoch, scaler)
                course.seconds += time.perf_counter() - begin
                agree(self.model)
                score = None if validation is None else self._score(validation)
                course.add(loss, score, self.model, self.patience)
                self._save(course)
            if course.best is not None:
                put_back(self.model, course.best)
        self.optimizer.zero_grad()
        return course

    def _epoch(self, batches: Data, epoch: int, scaler: Any) -> float:
        """Mean loss of one pass over the data."""
        # A checkpoint, the other processes or the validation may have changed the model.
        self._training.read()
        sampler = getattr(getattr(batches, "data", None), "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        title = f"epoch {epoch + 1}/{self.epochs}"
        return one_pass(self.model, batches, partial(self._step, scaler), title, self.progress)

    def _step(self, scaler: Any, batch: Any, number: int) -> Tensor:
        """One step of the optimiser; the loss, detached."""
        samples = self._attacked(batch)
        self.optimizer.zero_grad()
        with self._training.block_gradients():
            loss = self._batch_loss(*samples, number)
            scaler.scale(loss).backward()
        average_gradients(self._training.parameters())
        if self.clip_norm is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._training.parameters(), self.clip_norm)
        scaler.step(self.optimizer)
        scaler.update()
        return loss.detach()

    def _batch_loss(
        self, inputs: Any, adversaries: Tensor | None, labels: Tensor, number: int
    ) -> Tensor:
        device = device_of(self.model)
        with torch.autocast(device.type, dtype=self.amp, enabled=self.amp is not None):
            if adversaries is None:
                return self._mean_loss(run(self.model, inputs, number), labels)
            # Together, so that batch norms see and record both as one.
            outputs = run(self.model, torch.cat([inputs, adversaries]), number)
            return 2 * self._mean_loss(outputs, torch.cat([labels, labels]))

    def _attacked(self, batch: tuple[Any, Tensor]) -> tuple[Any, Tensor | None, Tensor]:
        """Inputs, adversaries if there is an attack, and labels."""
        inputs, labels = batch
        if self.attack is None:
            return inputs, None, labels
        if self.adversaries == "fixed":
            return *inputs, labels
        return inputs, attacked(self.attack, self.model, inputs, labels), labels

    def _mean_loss(self, outputs: Any, labels: Tensor) -> Tensor:
        loss = self.loss(outputs, labels)
        return loss / len(labels) if self.loss is cross_entropy else loss.mean()

    def _score(self, validation: Validation) -> float:
        if callable(validation):
            return total([float(validation(self.model))], device_of(self.model))[0] / processes()
        clean = evaluate_attack(self.model, validation, None)
        if self.attack is None:
            return clean
        return (clean + evaluate_attack(self.model, validation, self.attack)) / 2

    def _measure(
        self,
        batches: Data,
        data: Data,
        validation: Validation | None,
        original: nn.Module,
        course: _Course,
    ) -> ReadaptResult:
        again = data if validation is None or callable(validation) else validation
        ra = (
            _accuracy(self.model, _adversaries(batches))
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

    def _resumed(self) -> _Course:
        found = self._checkpoint.load() if self.resume else None
        if found is None:
            return _Course([], [], 0.0)
        notes, best = found
        return _Course(notes["losses"], notes["scores"], notes["seconds"], best)

    def _save(self, course: _Course) -> None:
        notes = {"losses": course.losses, "scores": course.scores, "seconds": course.seconds}
        self._checkpoint.save(notes, course.best)


@dataclass
class _Course:
    """What happened so far.

    Attributes:
        best: Parameters and buffers at the best score, if they are wanted.
    """

    losses: list[float]
    scores: list[float]
    seconds: float
    best: dict[str, Tensor] | None = None

    def add(self, loss: float, score: float | None, model: nn.Module, patience: int | None) -> None:
        """Another epoch."""
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


class _Attacked:
    """Batches of ((inputs, adversaries made for a model), labels)."""

    def __init__(self, batches: Data, attack: Attack, model: nn.Module) -> None:
        self.batches = batches
        self.attack = attack
        self.model = model

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for inputs, labels in self.batches:
            yield (inputs, attacked(self.attack, self.model, inputs, labels)), labels


def _adversaries(batches: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """(adversaries, labels) of batches of ((inputs, adversaries), labels)."""
    return ((adversaries, labels) for (_, adversaries), labels in batches)


class _Original(nn.Module):
    """A model with the values that it had before, whatever it has become."""

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.values = values

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return functional_call(self.model, self.values, arguments, keywords)


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
    batches: Data = Moved(data, device_of(model))
    if attack is not None:
        batches = _adversaries(_Attacked(batches, attack, made_for or model))
    return _accuracy(model, batches)


def _accuracy(model: nn.Module, batches: Data) -> float:
    right, samples = total(count_correct(model, batches), device_of(model))
    if not samples:
        raise DataError("there are no samples; give an iterable of (inputs, labels) batches")
    return right / samples


def _freezing(
    train: Literal["critical", "all"] | Freezing, critical: Slice | None, model: nn.Module
) -> Freezing:
    if isinstance(train, Freezing):
        if train.model is not model:
            raise ArgumentError("train is a Freezing of another model; make one of this model")
        return train
    if train == "all":
        everything = {
            name: torch.ones_like(parameter, dtype=torch.bool)
            for name, parameter in model.named_parameters()
        }
        return Freezing(model, everything)
    if train != "critical":
        raise ArgumentError(f"train is {train!r}; use 'critical', 'all' or a Freezing")
    if critical is None:
        raise ArgumentError(
            "train='critical' needs a slice; pass profile(model, data).slice(theta), or train='all'"
        )
    return train_critical(critical, model)


def _scheduler(name: str | None, optimizer: Optimizer, epochs: int) -> Any:
    if name is None:
        return None
    try:
        scheduler, _ = create_scheduler_v2(optimizer, sched=name, num_epochs=epochs)
    except Exception as error:
        raise ArgumentError(f"timm makes no scheduler {name!r}: {error}") from error
    if scheduler is None:
        raise ArgumentError(f"timm has no scheduler {name!r}; use 'cosine', 'step', ..., or None")
    return scheduler
