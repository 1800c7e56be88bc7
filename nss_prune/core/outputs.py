"""What a model's outputs mean: their divergence, Fisher information, predictions and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import (
    counted_batches,
    entered,
    first_batch,
)
from nss_prune.core.draws import Draws
from nss_prune.core.models import Forward, call_model, device_of, evaluation, run
from nss_prune.core.output_inference import Found, Labels, found_in, parts_of, weighted
from nss_prune.core.output_parts import Part, check_range
from nss_prune.core.output_units import Chances, Spread, over_processes
from nss_prune.core.processes import agreed
from nss_prune.errors import ArgumentError, DataError

LEAST_SAMPLES = 8
"""Variances and weights are not taken from fewer samples."""

LEAST_INFORMATION = 1e-6
"""Nats a sample; an output that tells less has nothing to lose, and the weight 1."""


@dataclass(frozen=True)
class Outputs:
    """The distribution that a model's outputs are the parameters of: independent parts.

    Attributes:
        parts: The tensors that count.
        select: Function of the outputs that gives the nest of tensors which the paths of the parts
            lead through; None for the outputs themselves.
        notes: What a user should know of the choice.
        alike: Whether the weights are such that all parts count alike, see :meth:`with_variance`.
        samples: That variances and weights were taken from; 0 where there were none.

    Raises:
        ArgumentError: There is no part.
    """

    parts: tuple[Part, ...]
    select: Callable[[Any], Any] | None = None
    notes: tuple[str, ...] = ()
    alike: bool = False
    samples: int = 0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ArgumentError("Outputs got no part; give one at least")

    @property
    def has_classes(self) -> bool:
        """Whether a part holds class scores."""
        return any(part.kind == "classes" for part in self.parts)

    @property
    def predicts(self) -> bool:
        """Whether :meth:`predictions` are known: a part holds classes or labels."""
        return any(part.kind != "values" for part in self.parts)

    @property
    def needs_data(self) -> bool:
        """Whether the variance of values, or the weights of parts alike, are not measured yet."""
        unknown = any(part.kind == "values" and part.variance is None for part in self.parts)
        return unknown or (self.alike and not self.samples)

    def drawn_loss(self, outputs: Any, draws: Draws) -> Tensor:
        """A scalar whose gradient by the outputs has their Fisher information as covariance.

        Summed over samples, positions and parts, whose information counts by their weights. What is
        drawn are random signs; see :meth:`Part.drawn`. In float32 at least.

        Raises:
            DataError: The outputs are not those described.
        """
        pairs = zip(self.parts, self.tensors(outputs), strict=True)
        return _total(
            part.drawn(tensor, draws, stream) for stream, (part, tensor) in enumerate(pairs)
        )

    def divergence(self, whole: Any, other: Any) -> Tensor:
        """KL divergence of the other outputs' distribution from that of the whole ones.

        Summed over positions and weighted parts, in nats: float64 ``[samples]``.

        Raises:
            DataError: The outputs are not those described, or not of the same samples.
        """
        both = zip(self.parts, self.tensors(whole), self.tensors(other), strict=True)
        return _total(part.divergence(wanted, got) for part, wanted, got in both)

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """Negative log-likelihood of the labels, summed over samples, positions and parts.

        Args:
            labels: A tensor for all parts that it fits, or nested as the outputs. A part without
                labels takes the classes that it predicts, and its mean where it holds values: the
                loss of a model that is right, and one that knows nothing of the sample.

        Raises:
            DataError: The labels fit no part.
        """
        tensors = self.tensors(outputs)
        labelled = zip(self.parts, tensors, self._labels(tensors, labels), strict=True)
        return _total(part.loss(tensor, label) for part, tensor, label in labelled)

    def explained(self, outputs: Any, labels: Any, samples: int) -> Tensor:
        """The sum of the scores that labels name, over samples, positions and parts.

        Args:
            outputs: Samples beyond the first ``samples`` do not count.
            labels: As of :meth:`loss`; None for the predicted classes. Values are explained
                themselves, each in units of its deviation.

        Raises:
            DataError: The labels fit no part.
        """
        tensors = [tensor[:samples] for tensor in self.tensors(outputs)]
        labelled = zip(self.parts, tensors, self._labels(tensors, labels), strict=True)
        return _total(part.explained(tensor, label) for part, tensor, label in labelled)

    def _labels(self, tensors: Sequence[Tensor], labels: Any) -> list[Tensor | None]:
        """The labels of each part; those for all where they fit it, and where they fit none."""
        given = Labels(labels)
        whole = given.whole()
        if whole is None:
            own = [given.of(part.path) for part in self.parts]
            if labels is not None and all(label is None for label in own):
                raise DataError(
                    f"the labels are a {type(labels).__name__}, nested otherwise than the outputs; "
                    "give a tensor, labels nested as the outputs are, or "
                    "loss=function(outputs, labels)"
                )
            return own
        whole = whole.to(tensors[0].device)
        fits = [part.fits(whole, tensor) for part, tensor in zip(self.parts, tensors, strict=True)]
        if not whole.is_floating_point() and any(
            fit and part.kind != "values" for part, fit in zip(self.parts, fits, strict=True)
        ):  # class indices are no values
            pairs = zip(self.parts, fits, strict=True)
            fits = [fit and part.kind != "values" for part, fit in pairs]
        return [whole if fit or not any(fits) else None for fit in fits]

    def predictions(self, outputs: Any) -> Tensor:
        """The class predicted, int64 ``[samples]``, or ``[samples, ...]`` for each position.

        Of the first part with classes; where there is none, of the first with labels: 0 or 1,
        ``[samples]`` for one label, else ``[samples, labels, ...]``.

        Raises:
            DataError: No output has classes or labels.
        """
        part = self._classes()
        return part.predicted(part.find(self._selected(outputs)))

    def _classes(self) -> Part:
        """The part that a prediction is of."""
        for kind in ("classes", "labels"):
            for part in self.parts:
                if part.kind == kind:
                    return part
        raise DataError(
            f"no class is predicted ({self.describe()}); use categories=None or a function, or "
            "say which output has classes by outputs="
        )

    def scores(self, outputs: Any) -> Tensor:
        """The class scores of the first part with classes, ``[samples, classes, ...]``.

        Raises:
            DataError: There is none.
        """
        if not self.has_classes:
            raise DataError(
                f"the model gives no class scores ({self.describe()}); say which output has "
                "classes by outputs=, if one has"
            )
        part = self._classes()
        assert part.axis is not None
        return part.find(self._selected(outputs)).movedim(part.axis, 1)

    def with_variance(self, outputs: Iterable[Any], *, shared: bool = False) -> Outputs:
        """The same in units of the variance of all outputs given, and with weights from them.

        Values in units of the variance of each channel over samples and positions (1 where it does
        not vary). Parts that count alike get weights by which losing any of them wholly, with the
        average over the data in its place, costs as much as losing the first.

        Args:
            shared: Whether the outputs of all processes count, which must all call it.

        Raises:
            DataError: The outputs are not those described.
            NumericalError: They are NaN or infinite.
        """
        sums = self._sums(outputs)
        if shared:
            sums = [over_processes(found) for found in sums]
        parts = [part.measured(found) for part, found in zip(self.parts, sums, strict=True)]
        if self.alike:
            told = [found.information() for found in sums]
            whole = next((one for one in told if one > LEAST_INFORMATION), 1.0)
            weights = [whole / one if one > LEAST_INFORMATION else 1.0 for one in told]
            pairs = zip(parts, weights, strict=True)
            parts = [replace(part, weight=weight) for part, weight in pairs]
        return replace(self, parts=tuple(parts), samples=sums[0].samples)

    def _sums(self, outputs: Iterable[Any]) -> list[Spread | Chances]:
        """What the outputs given add up to, of each part."""
        sums = [part.sums() for part in self.parts]
        for nest in outputs:
            for part, tensor, found in zip(self.parts, self.tensors(nest), sums, strict=True):
                found.add(part.arranged(tensor.detach()))
        return sums

    def describe(self) -> str:
        """One line for reports."""
        return "outputs: " + "; ".join(part.describe() for part in self.parts)

    def tensors(self, outputs: Any) -> list[Tensor]:
        """The tensor of each part, as the model gives it.

        Raises:
            DataError: The outputs are not those described.
        """
        nest = self._selected(outputs)
        return [part.find(nest) for part in self.parts]

    def _selected(self, outputs: Any) -> Any:
        return outputs if self.select is None else self.select(outputs)


def _total(terms: Iterable[Tensor]) -> Tensor:
    """Their sum, on the device of the first."""
    first, *others = terms
    for term in others:
        first = first + term.to(first.device)
    return first


OutputsSpec = None | str | Sequence[Any] | Mapping[Any, Any] | Callable[[Any], Any] | Outputs
"""What ``outputs=`` may be.

None (by outputs and labels), "classes", "labels" or "values" for all outputs, a list of these in
the order of the outputs or a dict by their keys (positions of a tuple), where outputs that are not
named do not count, nested as they are; ``(spec, weight)`` in place of any of these, without which
several outputs count alike; a function of the outputs that gives the tensors to keep, or
``(function, spec)``; or :class:`Outputs`.
"""


def resolve_outputs(spec: Any, outputs: Any, labels: Any = None) -> Outputs:
    """What outputs mean: as the user says, or as they and their labels decide.

    Values get the variance of these outputs for their unit, and several parts weights by which they
    count alike unless weights are given, where there are :data:`LEAST_SAMPLES`;
    :meth:`Outputs.with_variance` takes more data.

    Args:
        spec: See :data:`OutputsSpec`.
        outputs: Of one batch.
        labels: Of the same batch.

    Raises:
        ArgumentError: It is not certain what the outputs mean, or ``spec`` does not fit them.
        DataError: There are no outputs, or labels are no classes of them.
        NumericalError: Values are NaN or infinite.
    """
    if isinstance(spec, Outputs):
        found = spec
    else:
        select, inner = _split(spec)
        tensors = found_in(outputs if select is None else _kept(select, outputs))
        parts = tuple(parts_of(inner, tensors, Labels(labels)))
        alike = len(parts) > 1 and not weighted(inner)
        found = Outputs(parts, select, tuple(_doubts(tensors, parts)), alike)
    samples = min(len(tensor) for tensor in found.tensors(outputs))
    return (
        found.with_variance([outputs]) if found.needs_data and samples >= LEAST_SAMPLES else found
    )


def _split(spec: Any) -> tuple[Callable[[Any], Any] | None, Any]:
    """The function of a specification, and the rest of it."""
    if callable(spec):
        return spec, None
    if isinstance(spec, tuple) and len(spec) == 2 and callable(spec[0]):
        return spec
    return None, spec


def _kept(select: Callable[[Any], Any], outputs: Any) -> Any:
    try:
        return select(outputs)
    except Exception as error:
        raise ArgumentError(
            f"the function outputs= fails on a {type(outputs).__name__}: {error}; give one that "
            "takes the model's outputs and returns the tensors to keep"
        ) from error


def _doubts(found: Sequence[Found], parts: Iterable[Part]) -> Iterator[str]:
    """Scores that look like probabilities."""
    tensors = {one.path: one.tensor.detach() for one in found}
    for part in parts:
        if part.kind == "values":
            continue
        entries = part.arranged(tensors[part.path]).double()
        if not bool(((entries >= 0) & (entries <= 1)).all()):
            continue
        sums = entries.sum(-1)
        alike = torch.allclose(sums, torch.ones_like(sums), atol=1e-2)
        if part.kind == "labels" or alike:
            yield (
                f"{part.name} holds numbers from 0 to 1, which are taken for scores before "
                f"{'softmax' if alike else 'sigmoid'}; where they are probabilities, give "
                "outputs=function that returns their scores (logarithms for classes)"
            )


@agreed()
def outputs_of(
    model: nn.Module,
    data: Iterable[Any],
    spec: Any = None,
    *,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> Outputs:
    """What a model's outputs mean, from its first batch; units and weights from all data.

    With values or several parts there is a forward pass over all data for these, so that they do
    not depend on the order of the samples. Data that can be iterated only once loses its first
    batch, and units and weights are those of this one. The model is left as found.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them.
        spec: See :data:`OutputsSpec`.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        ArgumentError, DataError, NumericalError: As :func:`resolve_outputs`; or there is no batch.
    """
    with evaluation(model), torch.no_grad():
        inputs, labels, _ = entered(model, first_batch(data, device_of(model))[0], 0)
        found = resolve_outputs(spec, run(model, inputs, 0, forward), labels)
    return with_units(found, spec, model, data, forward, progress)


def with_units(
    found: Outputs,
    spec: Any,
    model: nn.Module,
    data: Iterable[Any],
    forward: Forward = call_model,
    progress: bool | None = None,
) -> Outputs:
    """Resolved outputs with units and weights from all data.

    As they are where there is neither, where ``spec`` has them already, or where the data can be
    iterated only once.
    """
    measurable = found.alike or any(part.kind == "values" for part in found.parts)
    known = isinstance(spec, Outputs) and not spec.needs_data
    if not measurable or known or isinstance(data, Iterator):
        return found
    with evaluation(model), torch.no_grad():
        batches = counted_batches(model, data, progress, "outputs")
        return found.with_variance(
            (run(model, inputs, number, forward) for number, inputs, _ in batches), shared=True
        )


def class_scores(outputs: Any) -> Tensor:
    """The class scores in a model's output, ``[samples, classes, ...]``.

    Raises:
        DataError: There are none.
    """
    scores: Any = getattr(outputs, "logits", outputs)
    if isinstance(scores, (tuple, list)):
        scores = scores[0]
    if not isinstance(scores, Tensor) or scores.dim() < 2:
        kind = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise DataError(
            f"the model gives {kind}, not class scores [samples, classes]; pass "
            "loss=function(outputs, labels) and categories=None or a function"
        )
    return scores


def cross_entropy(outputs: Any, labels: Any) -> Tensor:
    """The default loss, summed over the samples.

    Cross entropy with class indices ``[samples, ...]``; binary cross entropy where the labels
    are zeros and ones of the shape of the scores (several labels for a sample).

    Raises:
        DataError: Labels that are not classes of the output.
    """
    scores = class_scores(outputs)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    labels = torch.as_tensor(labels).to(scores.device)
    functional = torch.nn.functional
    if labels.shape == scores.shape and ((labels == 0) | (labels == 1)).all():
        return functional.binary_cross_entropy_with_logits(
            scores, labels.to(scores.dtype), reduction="sum"
        )
    if labels.is_floating_point() or labels.shape != (scores.shape[0], *scores.shape[2:]):
        raise DataError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)} for outputs "
            f"{tuple(scores.shape)}; class indices are needed, or loss=function(outputs, labels)"
        )
    check_range(labels, scores.shape[1])
    return functional.cross_entropy(scores, labels.long(), reduction="sum")


def predictions(outputs: Any) -> Tensor:
    """The class with the highest score, ``[samples, ...]``."""
    return class_scores(outputs).argmax(1)
