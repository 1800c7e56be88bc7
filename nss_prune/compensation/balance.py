"""The classes, balanced as the whole model balances them: a shift of the scores, without labels.

A model that lost many neurons leans towards some classes. It gives them more probability than the
whole model did, and others lose most of their samples. A shift b of the scores makes up for that,
and lies in the biases of the head, the layer that makes them:

    minimise  mean log Σ_c exp(z_c + b_c) − Σ_c p̄_c b_c + ½ λ Σ_c b_c²,

where z are the smaller model's scores, and p̄ the mean probabilities of the classes by the whole
model, on the same data. Up to a constant and the penalty, this is the mean Kullback-Leibler
divergence of the shifted outputs from those of the whole model. It is convex, and without the
penalty the mean probability of every class becomes what it was.

λ is chosen by cross-validation on samples left out, and where no shift helps there, none is made:
a thousand classes are not balanced by the few samples that there are of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import (
    as_computed,
    entered,
    first_batch,
    labelled_batches,
)
from nss_prune.core.classifier import find_classifier_by_shift, shifted_bias
from nss_prune.core.draws import Draws
from nss_prune.core.models import Forward, call_model, device_of, evaluation, run
from nss_prune.core.outputs import Outputs, resolve_outputs
from nss_prune.core.processes import agreed, decided, gathered, processes
from nss_prune.core.views import views_of
from nss_prune.errors import ModelMismatchError, NumericalError

FOLDS = 5
PENALTIES = tuple(10.0**-power for power in range(1, 6))
MOST_VALUES = 2**26  # scores that are kept, 512 MiB


@dataclass(frozen=True)
class ClassShares:
    """What a model gives each class of some data.

    Attributes:
        sums: Σ of the probabilities over samples and positions, float64 ``[folds, classes]``; a
            sample is in a fold by its content, with all its augmented copies.
        counts: Samples × positions, ``[folds]``.
    """

    sums: Tensor
    counts: Tensor

    def mean(self, folds: Tensor | None = None) -> Tensor:
        """The mean probability of each class, ``[classes]``, of all data.

        Args:
            folds: Of the data in some folds alone, True for these, ``[folds]``.
        """
        chosen = slice(None) if folds is None else folds
        return self.sums[chosen].sum(0) / self.counts[chosen].sum()


@dataclass(frozen=True)
class Balanced:
    """What was balanced.

    Attributes:
        head: The layer with the new bias; None where nothing was changed.
        shift: What was added to the scores, float64 ``[classes]``.
        note: Why nothing was changed; "" where something was.
    """

    head: str | None
    shift: Tensor
    note: str = ""


@agreed()
def class_shares(
    model: nn.Module,
    data: Iterable[Any],
    *,
    outputs: Outputs | None = None,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> ClassShares:
    """What the model gives each class, from one pass over the data; the model stays as it is.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them; labels are not used but to find out
            what the outputs mean. Samples beyond :data:`MOST_VALUES` scores are not needed.
        outputs: What the outputs mean, of which the first with classes is balanced; None for what
            the first batch says.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        ArgumentError: The first batch does not say what the outputs mean.
        DataError: The data is empty, or the model refuses it or gives no class scores.
        NumericalError: Scores are NaN or infinite.
    """
    scores, folds = _scores(model, data, outputs, forward, progress)
    shares = _shares(scores.softmax(1), folds)
    everywhere = gathered((shares.sums, shares.counts))
    return ClassShares(*(sum(parts[1:], parts[0]) for parts in zip(*everywhere, strict=True)))


@agreed()
def balance(
    model: nn.Module,
    data: Iterable[Any],
    whole: ClassShares,
    *,
    outputs: Outputs | None = None,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> Balanced:
    """Shift the scores in place so that the classes get what the whole model gave them.

    The head is the last linear layer or convolution whose bias moves the scores by as much, which
    is tried. It gets a new bias, and nothing is written to the old one.

    Args:
        data: The same as of ``whole``.
        whole: By :func:`class_shares` of the model before neurons were removed.
        outputs: As of ``whole``.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        ModelMismatchError: ``whole`` is of other classes.
        ArgumentError, DataError, NumericalError: As :func:`class_shares`. In every case the model
            is as before.
    """
    scores, folds = _scores(model, data, outputs, forward, progress)
    none = torch.zeros(scores.shape[1], dtype=torch.float64)
    if whole.sums.shape[1] != len(none):
        raise ModelMismatchError(
            f"the whole model has {whole.sums.shape[1]} classes, this one {len(none)}; give the "
            "class_shares of the same model before neurons were removed"
        )
    head = _head(model, data, outputs, forward)
    if head is None:
        why = "no layer's bias alone moves the class scores"
        return Balanced(None, none, f"the classes are not balanced: {why}")
    everywhere = gathered((scores, folds))
    together = [torch.cat(parts) for parts in zip(*everywhere, strict=True)]
    shift = decided(lambda: _fitted(together[0], together[1], whole))
    if shift is None:
        why = "no shift of their scores helps on samples left out"
        return Balanced(None, none, f"the classes are not balanced: {why}")
    module: Any = model.get_submodule(head)
    module.bias = shifted_bias(module, shift)
    return Balanced(head, shift)


@torch.no_grad()
def _scores(
    model: nn.Module,
    data: Iterable[Any],
    outputs: Outputs | None,
    forward: Forward,
    progress: bool | None,
) -> tuple[Tensor, Tensor]:
    """Scores, float64 ``[places, classes]``, and the fold of each, both on the CPU."""
    found: list[Tensor] = []
    folds: list[Tensor] = []
    values = 0
    first, data = first_batch(data, device_of(model)) if processes() > 1 else (None, data)
    with evaluation(model):
        batches = _scores_by_place(model, data, progress, "balance", outputs, forward)
        for by_place, inputs in batches:
            fold = _folds(inputs, views_of(data))
            folds.append(fold.repeat_interleave(len(by_place) // len(fold)))
            found.append(by_place.cpu().double())
            values += by_place.numel()
            if values >= MOST_VALUES // processes():
                break
    if not found:  # all samples are in other processes
        by_place, _ = next(_scores_by_place(model, [first], False, "balance", outputs, forward))
        found, folds = [by_place[:0].cpu().double()], [torch.zeros(0, dtype=torch.long)]
    together = torch.cat(found)
    if not torch.isfinite(together.sum()):
        raise NumericalError(
            "the class scores are NaN or infinite; check the data and the model's weights"
        )
    return together, torch.cat(folds)


def _scores_by_place(
    model: nn.Module,
    data: Iterable[Any],
    progress: bool | None,
    label: str,
    outputs: Outputs | None = None,
    forward: Forward = call_model,
) -> Iterator[tuple[Tensor, Any]]:
    """The class scores of every batch, ``[places, classes]`` sample by sample, and its inputs.

    Args:
        outputs: What the outputs mean; None for what the first batch says.

    Raises:
        ArgumentError: It does not say what the outputs mean.
        DataError: There is no batch, it cannot be used, or the model gives no class scores.
    """
    for number, inputs, labels, _ in labelled_batches(model, data, progress, label):
        found = run(model, inputs, number, forward)
        outputs = resolve_outputs(None, found, labels) if outputs is None else outputs
        scores = as_computed(outputs.scores(found))
        yield scores.movedim(1, -1).flatten(0, -2), inputs


def _folds(inputs: Any, views: int) -> Tensor:
    """The fold of each sample, by its content and not by its place, which a shuffle changes.

    Augmented copies of a sample are in the fold of the first of them.
    """
    keys = Draws(inputs).keys.cpu()
    return keys[::views].repeat_interleave(views) % FOLDS


def _shares(probabilities: Tensor, folds: Tensor) -> ClassShares:
    sums = probabilities.new_zeros(FOLDS, probabilities.shape[1]).index_add(0, folds, probabilities)
    return ClassShares(sums, torch.bincount(folds, minlength=FOLDS))


def _fitted(scores: Tensor, folds: Tensor, whole: ClassShares) -> Tensor | None:
    """The shift by the penalty that does best on samples left out; None where none does better."""
    used = [fold for fold in range(FOLDS) if (folds == fold).any() and whole.counts[fold]]
    if len(used) < 2:
        return None
    gains = torch.zeros(len(PENALTIES), dtype=torch.float64)
    for fold in used:
        out, left_out = folds == fold, torch.arange(FOLDS) == fold
        held_out, wanted = scores[out], whole.mean(left_out)
        before = _divergence(held_out, wanted, torch.zeros_like(wanted))
        for position, shift in enumerate(_shifts(scores[~out], whole.mean(~left_out))):
            after = _divergence(held_out, wanted, shift)
            gains[position] += float(before - after) * len(held_out)
    best = int(gains.argmax())
    if not gains[best] > 0:
        return None
    *_, shift = _shifts(scores, whole.mean(), PENALTIES[: best + 1])
    return shift


def _shifts(
    scores: Tensor, wanted: Tensor, penalties: Iterable[float] = PENALTIES
) -> Iterator[Tensor]:
    """The best shift for each penalty, from the largest down."""
    shift = torch.zeros_like(wanted)
    for penalty in penalties:
        shift = _minimum(scores, wanted, penalty, shift)
        yield shift


def _minimum(scores: Tensor, wanted: Tensor, penalty: float, start: Tensor) -> Tensor:
    shift = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [shift], max_iter=200, tolerance_grad=1e-8, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = _divergence(scores, wanted, shift) + penalty / 2 * shift.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    return shift.detach()


def _divergence(scores: Tensor, wanted: Tensor, shift: Tensor) -> Tensor:
    """That of the shifted outputs from the whole model's, up to a constant."""
    return (scores + shift).logsumexp(1).mean() - wanted @ shift


def _head(
    model: nn.Module, data: Iterable[Any], outputs: Outputs | None, forward: Forward
) -> str | None:
    """The last layer whose bias moves the scores by as much, or None."""
    with evaluation(model), torch.no_grad():
        inputs, labels, _ = entered(model, first_batch(data, device_of(model))[0], 0)
        if outputs is None:
            outputs = resolve_outputs(None, run(model, inputs, 0, forward), labels)
    return find_classifier_by_shift(model, inputs, 0, scores=outputs.scores, forward=forward)
