"""Prune, fine-tune, measure, again: until a rule says stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nss_prune.core.bits import pack, unpack
from nss_prune.core.files import read_file, write_file
from nss_prune.errors import ArgumentError, ModelMismatchError, NothingToPruneError
from nss_prune.unstructured.allocation import Allocation, find_method
from nss_prune.unstructured.masks import masks_of, refresh, set_masks
from nss_prune.unstructured.sparsify import check_share, keep_best
from nss_prune.unstructured.storage import match, shapes
from nss_prune.unstructured.weights import (
    IgnoredLayers,
    Layer,
    as_sequence,
    compression_rate,
    prunable_layers,
    readable_layers,
    weight_count,
)

_CHECKPOINT = "nss_prune iterations"


@dataclass(frozen=True)
class Iteration:
    """The state of a model after an iteration.

    Attributes:
        number: from 1; 0 is the state before the first.
        compression_rate: share of the dense Linear and convolution weights that are gone.
        accuracy: what `evaluate` returned, a share in [0, 1]; None without it.
        seconds: wall-clock time of pruning, fine-tuning and evaluating.
    """

    number: int
    compression_rate: float
    accuracy: float | None
    seconds: float


class StopRule:
    """When to stop; derive from it and override one of the two to write another.

    Attributes:
        needs_accuracy: whether it reads the accuracy, so that `evaluate` must be given.
        may_reject: whether it overrides `rejects`, so that the state before is remembered.
    """

    needs_accuracy: ClassVar[bool] = False
    may_reject: ClassVar[bool] = False

    def reached(self, iteration: Iteration) -> bool:
        """Whether this iteration, which is accepted, is the last."""
        return False

    def rejects(self, iteration: Iteration) -> bool:
        """Whether this iteration must be undone, so that the one before it is the last."""
        return False


@dataclass(frozen=True)
class Iterations(StopRule):
    """Stop after so many iterations in all, those before a resumption included.

    Attributes:
        count: at least 1.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ArgumentError(f"Iterations is {self.count}: pass 1 or more")

    def reached(self, iteration: Iteration) -> bool:
        return iteration.number >= self.count


@dataclass(frozen=True)
class CompressionRate(StopRule):
    """Stop with the first iteration that has this compression rate or more.

    Attributes:
        share: of the dense weights that are to be gone, in (0, 1).
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ArgumentError(
                f"CompressionRate is {self.share}: it is a share of the dense weights, pass a "
                "number in (0, 1), for example 0.9 for 90 %"
            )

    def reached(self, iteration: Iteration) -> bool:
        return iteration.compression_rate >= self.share


@dataclass(frozen=True)
class AccuracyTolerance(StopRule):
    """Stop before the first iteration that loses more accuracy than this.

    That iteration is undone and not yielded: the model has the masks, and the weights, of
    the last iteration within the tolerance.

    Attributes:
        points: loss that is tolerated, in percentage points, at least 0.
        reference: accuracy that the loss counts from, a share in [0, 1].
    """

    needs_accuracy: ClassVar[bool] = True
    may_reject: ClassVar[bool] = True

    points: float
    reference: float

    def __post_init__(self) -> None:
        if not self.points >= 0:
            raise ArgumentError(f"points is {self.points}: pass 0 or more percentage points")
        _check_accuracy("reference", self.reference)

    def rejects(self, iteration: Iteration) -> bool:
        assert iteration.accuracy is not None
        return iteration.accuracy < self.reference - self.points / 100


def iterative_sparsify(
    model: nn.Module,
    rate: float,
    method: str | Allocation = "lamp",
    *,
    until: StopRule | Sequence[StopRule],
    finetune: Callable[[nn.Module], object] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    ignored_layers: IgnoredLayers = (),
    checkpoint: str | os.PathLike[str] | None = None,
    dense_weights: int | None = None,
) -> Iterator[Iteration]:
    """Mask a share of the remaining weights again and again; yields after every iteration.

    After k iterations `round(remaining at the start * (1 - rate)^k)` weights are kept, so
    that rounding does not add up. The model of the loop's body is the pruned one; leaving
    the loop early is fine. What `finetune` or `evaluate` raise ends the iterations where
    they are: start again from the checkpoint.

    Args:
        model: any module with float weights; changed in place.
        rate: share of the remaining weights to mask in an iteration, in (0, 1); the paper
            takes 0.1 for MLP-MNIST and 0.05 elsewhere.
        method: as for `sparsify`.
        until: a stop rule, or several of which the first that holds counts:
            `Iterations`, `CompressionRate`, `AccuracyTolerance`. Nothing is done if one
            holds at the start.
        finetune: called with the model after each pruning; make the optimizer inside. Masked
            weights stay zero. Default: no fine-tuning.
        evaluate: called with the model after that; returns the accuracy, a share in [0, 1].
        ignored_layers: as for `sparsify`.
        checkpoint: a file that is written after every iteration, with the masks, and the
            weights if there is a `finetune`. If it exists, the model gets its state now and
            the iterations go on from it. Random states are the caller's to restore.
        dense_weights: number of weights that the compression rate counts from, for a model
            that lost neurons before: its `weight_count` as it was. Default: this model's.

    Yields:
        One `Iteration` for each that was accepted.

    Raises:
        ArgumentError: an argument is outside what it may be, or a rule needs `evaluate`.
        FileFormatError: the checkpoint is damaged, foreign, or of a newer version.
        ModelMismatchError: the checkpoint is of another model, rate or method.
        NothingToPruneError, NumericalError: as `sparsify`; later also when the next
            iteration would leave no weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(100, 100))
        >>> for iteration in iterative_sparsify(model, 0.1, until=CompressionRate(0.2)):
        ...     print(iteration.number, round(iteration.compression_rate, 6))
        1 0.1
        2 0.19
        3 0.271
    """
    check_share("rate", rate, least_is_allowed=False)
    find_method(method)
    rules = _rules(until, evaluate)
    ignored = as_sequence(ignored_layers)
    layers = prunable_layers(model, ignored)
    dense_weights = weight_count(model) if dense_weights is None else int(dense_weights)
    start = _Start(
        last=Iteration(0, compression_rate(model, dense_weights), None, 0.0),
        remaining=sum(layer.remaining for layer in layers),
    )
    run = _Run(model, float(rate), method, rules, finetune, evaluate, ignored, dense_weights)
    if checkpoint is None:
        return run.iterations(start, None)
    file = _Checkpoint(Path(checkpoint), run.settings(layers))
    return run.iterations(file.restore(model) if file.path.exists() else start, file)


@dataclass(frozen=True)
class _Start:
    """Where iterations go on: after which one, and how many weights remained before the first."""

    last: Iteration
    remaining: int


@dataclass(frozen=True)
class _Run:
    """The arguments of :func:`iterative_sparsify`, checked."""

    model: nn.Module
    rate: float
    method: str | Allocation
    rules: tuple[StopRule, ...]
    finetune: Callable[[nn.Module], object] | None
    evaluate: Callable[[nn.Module], float] | None
    ignored_layers: Sequence[nn.Module | str]
    dense_weights: int

    def settings(self, layers: Sequence[Layer]) -> dict[str, Any]:
        """What must be the same when the iterations are resumed."""
        method = self.method
        return {
            "rate": self.rate,
            "method": method if isinstance(method, str) else getattr(method, "__qualname__", ""),
            "dense_weights": self.dense_weights,
            "finetune": self.finetune is not None,
            "layers": [layer.name for layer in layers],
        }

    def iterations(self, start: _Start, file: _Checkpoint | None) -> Iterator[Iteration]:
        last = start.last
        while not any(rule.reached(last) for rule in self.rules):
            undo = self._undo() if any(rule.may_reject for rule in self.rules) else None
            last = self._next(last.number + 1, start.remaining)
            if undo is not None and any(rule.rejects(last) for rule in self.rules):
                undo()
                return
            if file is not None:
                file.write(self.model, _Start(last, start.remaining))
            yield last

    def _next(self, number: int, remaining_at_start: int) -> Iteration:
        began = time.perf_counter()
        keep = round(remaining_at_start * (1 - self.rate) ** number)
        if keep == 0:
            raise NothingToPruneError(
                "another iteration would leave no weight: stop earlier, for example by adding "
                "a CompressionRate to until"
            )
        layers = prunable_layers(self.model, self.ignored_layers)
        keep_best(self.model, layers, keep, self.method)
        if self.finetune is not None:
            self.finetune(self.model)
            refresh(self.model)
        accuracy = None if self.evaluate is None else float(self.evaluate(self.model))
        if accuracy is not None:
            _check_accuracy("what evaluate returned", accuracy)
        rate = compression_rate(self.model, self.dense_weights)
        return Iteration(number, rate, accuracy, time.perf_counter() - began)

    def _undo(self) -> Callable[[], None]:
        """What brings back the masks as they are now and, after a finetune, all values."""
        model = self.model
        masks = {layer: layer.mask for layer in prunable_layers(model, self.ignored_layers)}
        tensors = _state(model).values() if self.finetune is not None else ()
        values = [(tensor, tensor.detach().clone()) for tensor in tensors]

        def undo() -> None:
            _copy(values)
            set_masks(model, masks)
            refresh(model)

        return undo


def _rules(
    until: StopRule | Sequence[StopRule], evaluate: Callable[[nn.Module], float] | None
) -> tuple[StopRule, ...]:
    rules = tuple(until) if isinstance(until, Sequence) else (until,)
    if not rules or not all(isinstance(rule, StopRule) for rule in rules):
        raise ArgumentError(
            f"until is {until!r}: pass one or more of Iterations, CompressionRate, "
            "AccuracyTolerance, for example until=Iterations(10)"
        )
    if evaluate is None and any(rule.needs_accuracy for rule in rules):
        raise ArgumentError(f"until is {until!r}, which needs the accuracy: pass evaluate")
    return rules


def _check_accuracy(name: str, accuracy: float) -> None:
    if not 0 <= accuracy <= 1:
        raise ArgumentError(
            f"{name} is {accuracy}: an accuracy is a share in [0, 1], for example 0.984 for 98.4 %"
        )


def _copy(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they have without masks; no masks."""
    layers = readable_layers(model)
    weights = {id(layer.weight) for layer in layers}
    masks = {
        id(module._buffers.get(f"{attribute}_mask"))
        for layer in layers
        for module, attribute in layer.holders
    }
    return {
        name.removesuffix("_orig") if id(tensor) in weights else name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if id(tensor) not in masks
    }


@dataclass(frozen=True)
class _Checkpoint:
    """The file from which iterations go on.

    Attributes:
        path: the file.
        settings: what must be the same when they do.
    """

    path: Path
    settings: dict[str, Any]

    def write(self, model: nn.Module, start: _Start) -> None:
        names = self.settings["layers"]
        masks = {name: mask for name, mask in masks_of(model).items() if name in names}
        tensors = {f"mask {name}": bits for name, bits in pack(masks).items()}
        if self.settings["finetune"]:
            tensors |= {f"value {name}": value for name, value in _state(model).items()}
        notes = {"settings": self.settings, "shapes": shapes(masks), "start": asdict(start)}
        write_file(self.path, _CHECKPOINT, tensors, notes)

    def restore(self, model: nn.Module) -> _Start:
        """Give the model the state of the file."""
        tensors, notes = read_file(self.path, _CHECKPOINT)
        for key, value in self.settings.items():
            if notes["settings"][key] != value:
                raise ModelMismatchError(
                    f"checkpoint {str(self.path)!r} was made with {key} = "
                    f"{notes['settings'][key]!r}, this call has {value!r}: call as before or "
                    "choose another checkpoint"
                )
        bits = _named("mask ", tensors)
        masks = match(unpack(bits, notes["shapes"]), readable_layers(model))
        values = self._matched(_named("value ", tensors), _state(model))
        _copy(values)
        set_masks(model, masks)
        refresh(model)
        return _Start(Iteration(**notes["start"]["last"]), notes["start"]["remaining"])

    def _matched(
        self, values: dict[str, Tensor], state: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        if not self.settings["finetune"]:
            return []
        differing = sorted(
            name
            for name in values.keys() | state.keys()
            if name not in values or name not in state or values[name].shape != state[name].shape
        )
        if differing:
            raise ModelMismatchError(
                f"checkpoint {str(self.path)!r} is of another model: {differing} differ; build "
                "the model as before or choose another checkpoint"
            )
        return [(state[name], value) for name, value in values.items()]


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
