"""What a model's outputs mean: by what the user says, or by outputs and labels where they decide.

A tensor in the shape of the labels holds sigmoids where these are zeros and ones, else values; a
tensor with one axis more than integer labels holds classes on that axis. Without labels,
``[samples, classes]`` is taken for class scores and a single output for a value. Everything else is
refused with the argument that decides.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from nss_prune.core.nested import Path, at_path, items_in, tensors_by_path
from nss_prune.core.output_parts import (
    KINDS,
    Kind,
    Part,
    aligned,
    check_range,
    is_binary,
    squeezed,
)
from nss_prune.errors import ArgumentError, DataError

INTERNAL = ("hidden_state", "hidden_states", "attentions", "past_key_values", "cache", "loss")
"""Ends of the names of what a Hugging Face output holds beside the outputs of the task."""


@dataclass(frozen=True)
class Found:
    """A tensor of real numbers among the outputs, with the samples on its first axis."""

    path: Path
    tensor: Tensor

    def part(self, kind: Kind, axis: int | None = None, weight: float = 1.0) -> Part:
        """Its description; the axis of the channels by default."""
        axis = channel_axis(self.tensor) if axis is None else axis
        size = 1 if axis is None else self.tensor.shape[axis]
        return Part(self.path, kind, axis, size, weight)

    @property
    def is_logits(self) -> bool:
        """Whether its name says that it holds class scores."""
        return bool(self.path) and self.path[-1] == "logits"


@dataclass(frozen=True)
class Labels:
    """The labels of a batch: one tensor for all outputs, or nested as the outputs are."""

    given: Any

    def whole(self) -> Tensor | None:
        """The one tensor; None where there is none."""
        given = self.given
        if given is None or isinstance(given, Tensor):
            return given
        if isinstance(given, (tuple, list)) and any(_has_axes(item) for item in given):
            return None
        try:
            return torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):
            return None

    def of(self, path: Path) -> Tensor | None:
        """What is given at the place of an output in the nest."""
        found = at_path(self.given, path) if path and self.whole() is None else None
        return None if found is None else Labels(found).whole()

    def best(self, path: Path) -> Tensor | None:
        """Its own, or the ones for all."""
        own = self.of(path)
        return self.whole() if own is None else own


def _has_axes(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() > 0


def found_in(outputs: Any) -> list[Found]:
    """The tensors that count as outputs.

    Scalars and integers do not, and of a Hugging Face output neither do its hidden states,
    attentions and caches (the last hidden state does where there are no logits).

    Raises:
        DataError: There are none.
        ArgumentError: They do not agree on the number of samples.
    """
    found = [
        Found(path, tensor)
        for path, tensor in tensors_by_path(_task_outputs(outputs))
        if tensor.is_floating_point() and tensor.dim() > 0
    ]
    if not found:
        shapes = [f"{t.dtype} {tuple(t.shape)}" for _, t in tensors_by_path(outputs)]
        raise DataError(
            f"the model gives a {type(outputs).__name__} with tensors {shapes}: no real numbers "
            "[samples, ...] to compare; give outputs=function of it that returns the tensors"
        )
    if len({len(one.tensor) for one in found}) > 1:
        raise ArgumentError(
            f"the outputs {shown(found)} do not all have the samples on their first axis; "
            f"{remedy()}"
        )
    return found


def _task_outputs(outputs: Any) -> Any:
    """A Hugging Face output without what is internal to the model; anything else as it is."""
    if not (isinstance(outputs, Mapping) and is_dataclass(outputs)):
        return outputs
    ends = INTERNAL if "logits" in outputs else INTERNAL[1:]
    return {key: value for key, value in items_in(outputs) if not str(key).endswith(ends)}


def parts_of(spec: Any, found: Sequence[Found], labels: Labels, prefix: Path = ()) -> list[Part]:
    """The parts that a specification names below a place of the nest.

    Args:
        spec: None, a kind, a list or mapping of specifications, or a pair of one and its weight.

    Raises:
        ArgumentError: It does not fit the outputs, or they do not decide.
    """
    if spec is None:
        return inferred(found, labels)
    if isinstance(spec, str):
        return [named(spec, one, labels.best(one.path)) for one in found]
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[1], numbers.Real):
        return [_weighted(p, float(spec[1])) for p in parts_of(spec[0], found, labels, prefix)]
    if isinstance(spec, (list, tuple)) and len(spec) == 1 and found[0].path == prefix:
        return parts_of(spec[0], found, labels, prefix)
    below = _below(found, prefix)
    if isinstance(spec, (list, tuple)):
        if len(spec) != len(below):
            raise ArgumentError(
                f"outputs= names {len(spec)} outputs, the model gives {shown(found)}; name each, "
                "or the ones that count in a dict by their keys or positions"
            )
        spec = dict(zip(below, spec, strict=True))
    if not isinstance(spec, Mapping) or not spec:
        raise ArgumentError(f"outputs is {spec!r}; {remedy()}")
    if unknown := [key for key in spec if key not in below]:
        raise ArgumentError(
            f"outputs= names {unknown}, the model gives {shown(found)}; use {list(below)}"
        )
    return [
        part
        for key, inner in spec.items()
        for part in parts_of(inner, below[key], labels, (*prefix, key))
    ]


def _below(found: Iterable[Found], prefix: Path) -> dict[Any, list[Found]]:
    """Key below a place of the nest -> the tensors that it leads to."""
    below: dict[Any, list[Found]] = {}
    for one in found:
        for key in one.path[len(prefix) : len(prefix) + 1]:
            below.setdefault(key, []).append(one)
    return below


def _weighted(part: Part, weight: float) -> Part:
    return Part(part.path, part.kind, part.axis, part.size, part.weight * weight)


def named(kind: str, one: Found, labels: Tensor | None) -> Part:
    """An output of a kind that is given.

    Raises:
        ArgumentError: There is no such kind, or the tensor cannot be of it.
    """
    if kind not in KINDS:
        raise ArgumentError(f"an output is {kind!r}; {remedy()}")
    axis = channel_axis(one.tensor)
    if kind == "classes" and labels is not None:
        axis = class_axis(one, labels) or axis
    return one.part(kind, axis)  # type: ignore[arg-type]


def inferred(found: Sequence[Found], labels: Labels) -> list[Part]:
    """The meaning of outputs by their shapes and labels.

    Raises:
        ArgumentError: It is not certain.
        DataError: The labels are no classes of the only output.
    """
    if len(found) == 1:
        known = _single(found[0], labels)
        parts = None if known is None else [known]
    elif labels.given is None or any(one.is_logits for one in found):
        parts = _unlabelled(found)
    elif (whole := labels.whole()) is not None:
        parts = _several(found, whole)
    else:
        own = [(one, labels.of(one.path)) for one in found]
        each = [None if label is None else _labelled(one, label) for one, label in own]
        parts = [part for part in each if part is not None]
        parts = parts if len(parts) == len(each) else None
    if parts is None:
        raise ArgumentError(
            f"outputs {shown(found)} with {_shown_labels(labels)} do not say what they mean; "
            f"{remedy()}"
        )
    return parts


def remedy() -> str:
    """What to give."""
    return (
        "give outputs='classes' (softmax), 'labels' (sigmoids) or 'values' (squared error), a "
        "list or dict of these for several outputs, or a function that returns the tensors to keep"
    )


def shown(found: Sequence[Found]) -> str:
    """The outputs in words."""
    shapes = [f"{list(one.path) if one.path else ''}{tuple(one.tensor.shape)}" for one in found]
    return ", ".join(shapes)


def _shown_labels(labels: Labels) -> str:
    whole = labels.whole()
    if labels.given is None:
        return "no labels"
    if whole is None:
        return f"labels in a {type(labels.given).__name__}"
    return f"labels {whole.dtype} {tuple(whole.shape)}"


def channel_axis(tensor: Tensor) -> int | None:
    """The axis of classes, labels or channels: 1 of maps, the last of ``[samples, tokens, C]``."""
    return None if tensor.dim() == 1 else 2 if tensor.dim() == 3 else 1


def class_axis(one: Found, labels: Tensor) -> int | None:
    """The axis that an output has and integer labels do not; None where that is not certain."""
    shape = one.tensor.shape
    if labels.is_floating_point() or len(shape) < 2:
        return None
    wanted = squeezed(labels.shape)
    fitting = [
        axis
        for axis in sorted({1, len(shape) - 1})
        if shape[axis] > 1 and squeezed(shape[:axis] + shape[axis + 1 :]) == wanted
    ]
    if len(shape) == 3 and len(fitting) == 2:
        return 2 if one.is_logits else None
    return fitting[0] if fitting else None


def _single(one: Found, labels: Labels) -> Part | None:
    """The meaning of the only output."""
    label = labels.best(one.path)
    if label is not None:
        return _labelled(one, label)
    if labels.given is not None and not one.is_logits:
        return None
    return _default(one)


def _default(one: Found) -> Part | None:
    """The meaning of an output without labels."""
    shape = one.tensor.shape
    if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
        return one.part("values")
    if len(shape) == 2 or one.is_logits:
        return one.part("classes")
    return None


def _labelled(one: Found, labels: Tensor) -> Part | None:
    """The meaning of an output with labels of its own."""
    axis = class_axis(one, labels)
    wanted = aligned(labels, one.tensor)
    if wanted is not None:
        return _in_shape(one, wanted)
    if axis is None:
        return None
    check_range(labels, one.tensor.shape[axis])
    return one.part("classes", axis)


def _in_shape(one: Found, labels: Tensor) -> Part | None:
    """The meaning of an output with a label for every entry."""
    if is_binary(labels):
        return one.part("labels")
    axis = channel_axis(one.tensor)
    if labels.is_floating_point() and axis is not None and labels.shape[axis] > 1:
        sums = labels.sum(axis, dtype=torch.float64)
        if bool((labels >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            return None  # shares of classes, or values that add up to one
    return one.part("values")


def _unlabelled(found: Sequence[Found]) -> list[Part] | None:
    """The meaning of several outputs: by their names, or classes all alike."""
    if any(one.is_logits for one in found):
        return [one.part("classes") if one.is_logits else one.part("values") for one in found]
    shapes = {tuple(one.tensor.shape) for one in found}
    (shape, *others) = shapes
    if others or len(shape) != 2 or shape[1] < 2:
        return None
    return [one.part("classes") for one in found]


def _several(found: Sequence[Found], labels: Tensor) -> list[Part] | None:
    """The meaning of several outputs with one tensor of labels.

    The one that the labels fit is what they say, outputs like it are the same, others are values.
    """
    first = _described(found, labels)
    if first is None:
        return None
    main, part = first
    parts = []
    for one in found:
        if one is main or _alike(one.tensor, main.tensor):
            parts.append(one.part(part.kind, part.axis))
        elif labels.is_floating_point():
            return None
        else:
            parts.append(one.part("values"))
    return parts


def _described(found: Sequence[Found], labels: Tensor) -> tuple[Found, Part] | None:
    """The output that the labels describe, the first of several alike; None where in doubt."""
    fitting = [(one, part) for one in found if (part := _fitting(one, labels)) is not None]
    fitting = [pair for pair in fitting if pair[1].kind != "values"] or fitting
    if not fitting:
        return None
    if not labels.is_floating_point() and not _all_alike(fitting):
        # A class for every label seen, and none beyond, tells scores from other outputs.
        seen = max(2, int(labels.max()) + 1)
        fitting = [pair for pair in fitting if max(2, pair[1].size) == seen]
        if not fitting or fitting[0][0] is not found[0]:
            return None
    return fitting[0] if _all_alike(fitting) else None


def _all_alike(fitting: Sequence[tuple[Found, Part]]) -> bool:
    return all(_alike(one.tensor, fitting[0][0].tensor) for one, _ in fitting)


def _fitting(one: Found, labels: Tensor) -> Part | None:
    """The meaning of an output if the labels are its own; None where they cannot be."""
    try:
        return _labelled(one, labels)
    except DataError:
        return None


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs have the same axes and channels, on maps of any size."""
    axis = channel_axis(one)
    same = one.dim() == other.dim() and (axis is None or one.shape[axis] == other.shape[axis])
    return same
