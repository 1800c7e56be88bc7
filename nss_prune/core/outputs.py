"""What a model's outputs mean: their divergence, Fisher information, predictions and losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import as_computed, counted_batches, labelled_batches
from nss_prune.core.models import Forward, call_model, evaluation, run
from nss_prune.core.output_inference import Found, Labels, found_in, parts_of
from nss_prune.core.output_parts import Part, Spread, check_range
from nss_prune.errors import ArgumentError, DataError

LEAST_SAMPLES = 8
"""A variance of fewer samples is not taken for the unit of values."""


@dataclass(frozen=True)
class Outputs:
    """The distribution that a model's outputs are the parameters of: independent parts.

    Attributes:
        parts: The tensors that count.
        select: Function of the outputs that gives the nest of tensors which the paths of the parts
            lead through; None for the outputs themselves.
        notes: What a user should know of the choice.

    Raises:
        ArgumentError: There is no part.
    """

    parts: tuple[Part, ...]
    select: Callable[[Any], Any] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ArgumentError("Outputs got no part; give one at least")

    @property
    def has_classes(self) -> bool:
        """Whether a part holds class scores."""
        return any(part.kind == "classes" for part in self.parts)

    @property
    def has_values(self) -> bool:
        """Whether a part is measured in units of its variance."""
        return any(part.kind == "values" for part in self.parts)

    def drawn_loss(self, outputs: Any, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient by the outputs has their Fisher information as covariance.

        Summed over samples, positions and parts, whose information counts by their weights. What is
        drawn are random signs; see :meth:`Part.drawn`. In float32 at least.

        Raises:
            DataError: The outputs are not those described.
        """
        nest = self._selected(outputs)
        return torch.stack([part.drawn(nest, generator) for part in self.parts]).sum()

    def divergence(self, whole: Any, other: Any) -> Tensor:
        """KL divergence of the other outputs' distribution from that of the whole ones.

        Summed over positions and weighted parts, in nats: float64 ``[samples]``.

        Raises:
            DataError: The outputs are not those described, or not of the same samples.
        """
        nests = self._selected(whole), self._selected(other)
        found = [part.divergence(*nests) for part in self.parts]
        return torch.stack([part.to(found[0].device) for part in found]).sum(0)

    def loss(self, outputs: Any, labels: Any) -> Tensor:
        """Negative log-likelihood of the labels, summed over samples, positions and parts.

        Args:
            labels: A tensor for all parts that it fits, or nested as the outputs. A part without
                labels takes the classes that it predicts, and its mean where it holds values: the
                loss of a model that is right, and one that knows nothing of the sample.

        Raises:
            DataError: The labels fit no part.
        """
        nest, given = self._selected(outputs), Labels(labels)
        own = [self._labels_of(part, nest, given) for part in self.parts]
        losses = [part.loss(nest, label) for part, label in zip(self.parts, own, strict=True)]
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def _labels_of(self, part: Part, nest: Any, labels: Labels) -> Tensor | None:
        """The labels of a part; those for all where they fit it, and where they fit none."""
        whole = labels.whole()
        if whole is None:
            return labels.best(part.path)
        whole = whole.to(part.find(nest).device)
        fitting = {other.kind for other in self.parts if other.fits(whole, nest)}
        if fitting != {"values"} and not whole.is_floating_point():
            fitting.discard("values")  # class indices are no values
        if not fitting:
            return whole
        return whole if part.kind in fitting and part.fits(whole, nest) else None

    def predictions(self, outputs: Any) -> Tensor:
        """The class predicted, int64 ``[samples]``, or ``[samples, ...]`` for each position.

        Of the first part with classes; where there is none, of the first with labels: 0 or 1,
        ``[samples]`` for one label, else ``[samples, labels, ...]``.

        Raises:
            DataError: No output has classes or labels.
        """
        return self._classes().predicted(self._selected(outputs))

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

    def with_variance(self, outputs: Iterable[Any]) -> Outputs:
        """The same in units of the variance of all outputs given, at least two samples.

        Raises:
            DataError: The outputs are not those described.
            NumericalError: They are NaN or infinite.
        """
        spreads = [Spread() if part.kind == "values" else None for part in self.parts]
        for nest in map(self._selected, outputs):
            for part, spread in zip(self.parts, spreads, strict=True):
                if spread is not None:
                    spread.add(part.arranged(part.find(nest).detach()))
        pairs = zip(self.parts, spreads, strict=True)
        parts = tuple(part if spread is None else part.measured(spread) for part, spread in pairs)
        return replace(self, parts=parts)

    def describe(self) -> str:
        """One line for reports."""
        return "outputs: " + "; ".join(part.describe() for part in self.parts)

    def _selected(self, outputs: Any) -> Any:
        return outputs if self.select is None else self.select(outputs)


OutputsSpec = None | str | Sequence[Any] | Mapping[Any, Any] | Callable[[Any], Any] | Outputs
"""What ``outputs=`` may be.

None (by outputs and labels), "classes", "labels" or "values" for all outputs, a list of these in
the order of the outputs or a dict by their keys (positions of a tuple), where outputs that are not
named do not count, nested as they are; ``(spec, weight)`` in place of any of these; a function of
the outputs that gives the tensors to keep, or ``(function, spec)``; or :class:`Outputs`.
"""


def resolve_outputs(spec: Any, outputs: Any, labels: Any = None) -> Outputs:
    """What outputs mean: as the user says, or as they and their labels decide.

    Values get the variance of these outputs for their unit, where there are :data:`LEAST_SAMPLES`;
    :meth:`Outputs.with_variance` takes that of more.

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
        found = Outputs(parts, select, tuple(_doubts(tensors, parts)))
    samples = {len(part.find(found._selected(outputs))) for part in found.parts}
    unknown = any(part.kind == "values" and part.variance is None for part in found.parts)
    return found.with_variance([outputs]) if unknown and min(samples) >= LEAST_SAMPLES else found


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


def outputs_of(
    model: nn.Module,
    data: Iterable[Any],
    spec: Any = None,
    *,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> Outputs:
    """What a model's outputs mean, from its first batch; values in units of their variance.

    With values, the variance is that of all data, in a forward pass of its own: it does not depend
    on the order of the samples. Data that can be iterated only once loses its first batch, and the
    variance is that of this one. The model is left as found.

    Args:
        data: Batches as :func:`nss_prune.profile` takes them.
        spec: See :data:`OutputsSpec`.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar; None for only on a terminal.

    Raises:
        ArgumentError, DataError, NumericalError: As :func:`resolve_outputs`; or there is no batch.
    """
    with evaluation(model), torch.no_grad():
        for number, inputs, labels, _ in labelled_batches(model, data, False, "outputs"):
            found = resolve_outputs(spec, run(model, inputs, number, forward), labels)
            break
        if not found.has_values or iter(data) is data or _is_measured(spec):
            return found
        batches = counted_batches(model, data, progress, "outputs")
        return found.with_variance(
            run(model, inputs, number, forward) for number, inputs, _ in batches
        )


def _is_measured(spec: Any) -> bool:
    """Whether a specification has its variances."""
    return isinstance(spec, Outputs) and all(
        part.variance is not None for part in spec.parts if part.kind == "values"
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


def drawn_loss(scores: Tensor, generator: torch.Generator) -> Tensor:
    """A sum over samples whose gradient by the scores has the Fisher information for covariance.

    With random signs s, v = Σ_c s_c √p_c (1_c − p) has E[v vᵀ] = diag(p) − p pᵀ, as the gradient
    of −log p(y) with y drawn from p has. But a confident sample, where that is large for labels
    that are hardly ever drawn, shows as much in each draw. Scores are ``[samples, classes, ...]``.
    """
    by_place = scores.movedim(1, -1).flatten(0, -2)
    chances = by_place.detach().softmax(1)
    signs = torch.randint(2, chances.shape, generator=generator).to(chances) * 2 - 1
    roots = signs * chances.sqrt()
    return (by_place * (roots - chances * roots.sum(1, keepdim=True))).sum()


def scores_by_place(
    model: nn.Module, data: Iterable[Any], progress: bool | None, label: str
) -> Iterator[tuple[Tensor, int]]:
    """The class scores of every batch, ``[places, classes]`` sample by sample, and its samples.

    Raises:
        DataError: There is no batch, it cannot be used, or the model gives no class scores.
    """
    for number, inputs, samples in counted_batches(model, data, progress, label):
        scores = as_computed(class_scores(run(model, inputs, number)))
        yield scores.movedim(1, -1).flatten(0, -2), samples


def predictions(outputs: Any) -> Tensor:
    """The class with the highest score, ``[samples, ...]``."""
    return class_scores(outputs).argmax(1)
