"""Re-adaptation: the critical neurons of a model learn new samples, adversarial ones or others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.optim import Optimizer

from nss_prune.adaptation.adversarial_loss import AdversarialLoss
from nss_prune.adaptation.adversarial_training import AdversarialTraining, Progress
from nss_prune.adaptation.attacks import Attack, PerChannel, make_attack
from nss_prune.adaptation.datasets import Data, on_device_of, repeatable, with_labels
from nss_prune.adaptation.freezing import Freezing, train_all, train_critical
from nss_prune.adaptation.robustness import (
    ModelWith,
    Validation,
    accuracy,
    adversaries_of,
    attacked_once,
    evaluate_attack,
    validation_metrics,
)
from nss_prune.adaptation.sensitivity import check_budget, sensitive_slice
from nss_prune.core.processes import agreed, copy_from_first, unsharded
from nss_prune.core.undo import restored_on_error
from nss_prune.errors import ArgumentError
from nss_prune.graph.slices import Slice
from nss_prune.training.settings import Metrics, TrainingSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from nss_prune.training.settings import TrainingArguments

__all__ = ["ReadaptResult", "ReadaptTrainer", "Validation", "evaluate_attack"]

LOGGER = logging.getLogger("nss_prune")

NEARLY_ALL = 0.9
"""Share of the parameters from which a slice leaves too little out to speak of it."""


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
        accuracy: Share of samples, as they are, that it gets right: those of the validation, or
            the new ones.
        history: Metrics of each epoch.
        notes: What is worth knowing, such as a slice that leaves next to nothing out.
    """

    tpr: float
    ra: float
    raa: float | None
    seconds: float
    losses: tuple[float, ...]
    scores: tuple[float, ...]
    accuracy: float
    history: tuple[Metrics, ...]
    notes: tuple[str, ...] = ()


class ReadaptTrainer:
    """Train the critical neurons on new samples and their adversaries; all others keep their bits.

    Under torchrun, gradients are averaged over the processes, each with its own part of the data
    (as a DistributedSampler gives): all end with the same model, or raise what one of them raised.

    Args:
        model: The model, not wrapped; on any device. Its mode and flags stay as they are.
        slice: Its critical neurons. None where ``train`` does not need it, or with
            ``params_budget``.
        attack: "fgsm" or "pgd" with ``epsilon`` and ``normalization``; any function of (model,
            inputs, labels), such as ``PGD(0.3, steps=40, step_size=0.01)``; None to learn the
            samples as they are.
        epsilon: Strength of an attack by name, in the units of the inputs before normalising.
        normalization: Mean and standard deviation that the inputs went through, per channel.
        adversaries: "fresh" ones for the model as it is at each step, or "fixed" ones, made once
            for the model as it was before (and kept in memory with the data).
        train: "critical" neurons, "all" of the model, or a freezing of one's own.
        params_budget: In place of a slice, the largest share of the parameters that may train, in
            (0, 1]: of the neurons whose entries reduce the loss most a parameter, by gradients that
            :meth:`fit` measures (:mod:`nss_prune.adaptation.sensitivity`).
        progress: Whether to show a bar; by default in a terminal.
        **training: Deprecated; give these to :meth:`fit`.

    Attributes:
        slice: The critical neurons, those that :meth:`fit` chose with ``params_budget``.
        optimizer: The optimiser of the last :meth:`fit`, or None. One that was made there, by name
            or by a function, has parameters of its own in place of those that train in part.

    Raises:
        ArgumentError: An argument is outside what it may be.
        ModelMismatchError: The slice is of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        slice: Slice | None = None,
        attack: Literal["fgsm", "pgd"] | Attack | None = "fgsm",
        epsilon: PerChannel = 8 / 255,
        *,
        normalization: tuple[PerChannel, PerChannel] | None = None,
        adversaries: Literal["fresh", "fixed"] = "fresh",
        train: Literal["critical", "all"] | Freezing = "critical",
        params_budget: float | None = None,
        progress: bool | None = None,
        **training: Unpack[TrainingArguments],
    ) -> None:
        if adversaries not in ("fresh", "fixed"):
            raise ArgumentError(f"adversaries is {adversaries!r}; use 'fresh' or 'fixed'")
        TrainingSettings.of(training)
        if training:
            warnings.warn(
                f"give {', '.join(f'{name}=' for name in training)} to fit()",
                DeprecationWarning,
                stacklevel=2,
            )
        self.model = model = unsharded(model)
        self.attack = None if attack is None else make_attack(attack, epsilon, normalization)
        self.adversaries = adversaries
        self.params_budget = params_budget
        self.slice = slice
        self._freezing = _given(train, slice, model, params_budget)
        self.progress = progress
        self.optimizer: Optimizer | None = None
        self._notes = () if self._freezing is None else _notes(self._freezing, train)
        self._defaults = training
        self._result: ReadaptResult | None = None

    @property
    def freezing(self) -> Freezing:
        """What trains.

        Raises:
            ArgumentError: With ``params_budget`` it is chosen by :meth:`fit`, which was not called.
        """
        if self._freezing is None:
            raise ArgumentError(
                "params_budget chooses what trains by the data; call fit(data) first"
            )
        return self._freezing

    @property
    def result(self) -> ReadaptResult:
        """What :meth:`fit` came to.

        Raises:
            ArgumentError: It was not called, or did not end.
        """
        if self._result is None:
            raise ArgumentError("there is no result yet; call fit(data) first")
        return self._result

    @agreed()
    def fit(
        self,
        data: Data,
        validation: Validation | None = None,
        **training: Unpack[TrainingArguments],
    ) -> ReadaptResult:
        """Train, in place.

        Args:
            data: Batches of (inputs, labels) that can be gone through repeatedly.
            validation: Such batches, on which the score is the mean of the accuracies with and
                without attack and ``raa`` is measured; or a function of the model that gives a
                score, larger for better.
            **training: ``epochs``, ``optimizer``, ``learning_rate``, ``patience``, ``checkpoint``,
                ``on_epoch`` and others, see :class:`nss_prune.training.settings.TrainingSettings`.
                ``loss`` is cross entropy by default. Attacks stay in full precision.

        Raises:
            ArgumentError: An argument is outside what it may be, or there is ``patience`` but no
                validation.
            DataError: There are no batches, or the model or the attack refuses them.
            FileFormatError, ModelMismatchError: The checkpoint is damaged, of another model or of
                other hyper-parameters.
            NumericalError: The loss became NaN or infinite. Whatever is raised, the model and its
                optimiser are as they were before the call.
        """
        settings = TrainingSettings.of({**self._defaults, **training})
        settings.check_validation(validation)
        data = repeatable(data)
        self._result = None
        copy_from_first(self.model)
        with restored_on_error(self.model, values=True) as before:
            batches = self._batches(data)
            learner = self._learner(data, batches, settings)
            self.optimizer = learner.optimizer
            with restored_on_error(self.model, optimizer=self.optimizer):
                done = learner.run(batches, self._validate(validation), self.progress)
                original = ModelWith(self.model, before)
                self._result = self._measure(batches, data, validation, original, done)
        return self._result

    def _batches(self, data: Data) -> Data:
        """The data, or ((inputs, adversaries), labels) if those are fixed."""
        batches = on_device_of(self.model, data, with_labels)
        if self.attack is None or self.adversaries == "fresh":
            return batches
        return attacked_once(batches, self.attack, self.model)

    def _learner(
        self, data: Data, batches: Data, settings: TrainingSettings
    ) -> AdversarialTraining:
        """The training, of the neurons that the gradients choose if there is a budget."""
        fixed = self.adversaries == "fixed"
        objective = AdversarialLoss(self.model, self.attack, fixed, settings.loss)
        if self.params_budget is not None:
            example, _ = next(iter(on_device_of(self.model, data, with_labels)))
            self.slice = sensitive_slice(
                self.model, example, batches, objective.of_batch, self.params_budget
            )
            self._freezing = train_critical(self.slice, self.model)
        return AdversarialTraining(self.freezing, settings, objective)

    def _validate(self, validation: Validation | None) -> Callable[[], dict[str, float]] | None:
        if validation is None:
            return None
        return lambda: validation_metrics(self.model, validation, self.attack)

    def _measure(
        self,
        batches: Data,
        data: Data,
        validation: Validation | None,
        original: nn.Module,
        done: Progress,
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
            seconds=done.seconds,
            losses=done.losses,
            scores=done.scores,
            accuracy=evaluate_attack(self.model, again, None),
            history=tuple(done.history),
            notes=self._notes,
        )


def _notes(freezing: Freezing, train: Literal["critical", "all"] | Freezing) -> tuple[str, ...]:
    """What to say, and to log, of a slice that leaves next to nothing out."""
    if train != "critical" or freezing.share < NEARLY_ALL:
        return ()
    note = (
        f"the slice leaves next to nothing out: {freezing.share:.1%} of the parameters train, as "
        "convolutions are seldom redundant; take a smaller theta, or slice(ratio=0.5)"
    )
    LOGGER.warning(note)
    return (note,)


def _given(
    train: Literal["critical", "all"] | Freezing,
    critical: Slice | None,
    model: nn.Module,
    params_budget: float | None,
) -> Freezing | None:
    """What trains; None where a budget leaves that to the gradients."""
    if params_budget is not None:
        check_budget(params_budget)
        if critical is not None or train != "critical":
            raise ArgumentError(
                "params_budget chooses what trains by itself; give it without slice and train"
            )
        return None
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
            "train='critical' needs a slice; pass profile(model, data).slice(theta), "
            "params_budget=0.6, or train='all'"
        )
    return train_critical(critical, model)
