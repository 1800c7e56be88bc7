"""Prune, fine-tune, measure, again: until a rule says stop."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.bits import SHAPES, pack, unpack
from nss_prune.core.files import checked_contents, read_file, write_file
from nss_prune.core.renamed import with_new_names
from nss_prune.core.schema import (
    LARGEST,
    check_finite,
    check_tensors,
    either,
    names,
    number,
    one_of,
    record,
    refuse,
    text,
    truth,
    whole,
)
from nss_prune.core.undo import Snapshot, restored_on_error
from nss_prune.errors import ArgumentError, ModelMismatchError, NothingToPruneError
from nss_prune.unstructured.allocation import Allocation, find_method
from nss_prune.unstructured.masks import masks_of, refresh, set_masks
from nss_prune.unstructured.sparsify import check_share, keep_best
from nss_prune.unstructured.stopping import (
    AccuracyTolerance,
    CompressionRate,
    Iteration,
    Iterations,
    StopRule,
    check_accuracy,
    checked_rules,
)
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

__all__ = [
    "AccuracyTolerance",
    "CompressionRate",
    "Iteration",
    "Iterations",
    "StopRule",
    "iterative_sparsify",
]

_CHECKPOINT = "nss_prune iterations"
_PREFIXES = ("mask ", "value ")
_NOTES = record(
    {
        "settings": record(
            {
                "rate": number(0, 1),
                "method": text,
                "dense_weights": whole(),
                "finetune": truth,
                "layers": names,
            }
        ),
        "shapes": SHAPES,
        "start": record(
            {
                "last": record(
                    {
                        "number": whole(),
                        "compression_rate": number(-1e6, 1),
                        "accuracy": either(one_of(None), number(0, 1)),
                        "seconds": number(0, LARGEST),
                    }
                ),
                "remaining": whole(),
            }
        ),
    }
)


def iterative_sparsify(
    model: nn.Module,
    amount: float | None = None,
    method: str | Allocation = "lamp",
    *,
    until: StopRule | Sequence[StopRule],
    finetune: Callable[[nn.Module], object] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    ignored_layers: IgnoredLayers = (),
    checkpoint: str | os.PathLike[str] | None = None,
    dense_weights: int | None = None,
    rate: float | None = None,
) -> Iterator[Iteration]:
    """Mask a share of the remaining weights again and again; yields after every iteration.

    After k iterations `round(remaining at the start * (1 - amount)^k)` weights are kept. What
    `finetune` or `evaluate` raise ends the iterations: start again from the checkpoint.

    Args:
        model: any module with float weights; changed in place.
        amount: share of the remaining weights to mask in an iteration, in (0, 1); 0.05 in the
            paper (old name: `rate`).
        method: as for `sparsify`.
        until: one or more of `Iterations`, `CompressionRate`, `AccuracyTolerance`, of which the
            first that holds counts. Nothing is done if one holds at the start.
        finetune: called with the model after each pruning, to train it; makes its own optimizer.
        evaluate: called with the model after that; returns the accuracy, a share in [0, 1].
        ignored_layers: as for `sparsify`.
        checkpoint: a file written after every iteration: masks, and weights with a `finetune`. If
            it exists, the iterations go on from it. Random states are the caller's to restore.
        dense_weights: `weight_count` before neurons were removed, from which the compression rate
            counts. Default: this model's.

    Yields: One `Iteration` for each that was accepted.

    Raises:
        ArgumentError: an argument is outside what it may be, or a rule needs `evaluate`.
        FileFormatError: the checkpoint is damaged, foreign, or of a newer version.
        ModelMismatchError: the checkpoint is of another model, rate or method.
        NothingToPruneError, NumericalError: as `sparsify`, or the next iteration leaves no weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(100, 100))
        >>> [i.number for i in iterative_sparsify(model, 0.1, until=CompressionRate(0.2))]
        [1, 2, 3]
    """
    share, rules = _amount(amount, rate), checked_rules(until, evaluate)
    find_method(method)
    ignored = as_sequence(ignored_layers)
    layers = prunable_layers(model, ignored)
    dense_weights = weight_count(model) if dense_weights is None else int(dense_weights)
    start = _Start(
        last=Iteration(0, compression_rate(model, dense_weights), None, 0.0),
        remaining=sum(layer.remaining for layer in layers),
    )
    run = _Run(model, share, method, rules, finetune, evaluate, ignored, dense_weights)
    if checkpoint is None:
        return run.iterations(start, None)
    file = _Checkpoint(Path(checkpoint), run.settings(layers))
    return run.iterations(file.restore(model) if file.path.exists() else start, file)


def _amount(amount: float | None, rate: float | None) -> float:
    """The share to remove, by its name or its old one."""
    if rate is not None:
        given = with_new_names({"rate": rate}, {"rate": "amount"}, {"amount": amount})
        amount = given["amount"]
    if amount is None:
        raise ArgumentError("no amount is given; pass a share of the weights, for example 0.05")
    check_share("amount", amount, least_is_allowed=False)
    return float(amount)


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
            before = None
            if any(rule.may_reject for rule in self.rules):
                before = Snapshot(self.model, values=self.finetune is not None)
            last = self._next(last.number + 1, start.remaining)
            if before is not None and any(rule.rejects(last) for rule in self.rules):
                before.restore()
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
            check_accuracy("what evaluate returned", accuracy)
        rate = compression_rate(self.model, self.dense_weights)
        return Iteration(number, rate, accuracy, time.perf_counter() - began)


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
        tensors, notes = read_file(self.path, _CHECKPOINT, _NOTES)
        for key, value in self.settings.items():
            if notes["settings"][key] != value:
                raise ModelMismatchError(
                    f"checkpoint {str(self.path)!r} was made with {key} = "
                    f"{notes['settings'][key]!r}, this call has {value!r}: call as before or "
                    "choose another checkpoint"
                )
        bits = _named("mask ", tensors)
        with checked_contents(self.path):
            check_tensors(bits, notes["shapes"])
            check_tensors(tensors, [name for name in tensors if name.startswith(_PREFIXES)])
            stored = unpack(bits, notes["shapes"])
            _check_values(model, _named("value ", tensors))
        masks = match(stored, readable_layers(model))
        values = self._matched(_named("value ", tensors), _state(model))
        with restored_on_error(model, values=True):
            _copy(values)
            set_masks(model, masks)
            refresh(model)
            self._check_counts(model, notes["start"])
        return _Start(Iteration(**notes["start"]["last"]), notes["start"]["remaining"])

    def _check_counts(self, model: nn.Module, start: dict[str, Any]) -> None:
        """The counts of the file are those of its masks."""
        names = self.settings["layers"]
        layers = [layer for layer in readable_layers(model) if layer.name in names]
        least = sum(layer.remaining for layer in layers)
        most = sum(layer.weight.numel() for layer in layers)
        if not least <= start["remaining"] <= most:
            raise refuse("start.remaining", start["remaining"], f"{least} to {most}")
        number = start["last"]["number"]
        if least != round(start["remaining"] * (1 - self.settings["rate"]) ** number):
            raise refuse("start.last.number", number, f"what leaves {least} weights")
        found = compression_rate(model, self.settings["dense_weights"])
        if not math.isclose(start["last"]["compression_rate"], found, abs_tol=1e-9):
            raise refuse(
                "start.last.compression_rate", start["last"]["compression_rate"], f"{found}"
            )

    def _matched(
        self, values: dict[str, Tensor], state: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        if not self.settings["finetune"]:
            return []
        differing = sorted(
            name
            for name in values.keys() | state.keys()
            if name not in values or name not in state or not _alike(values[name], state[name])
        )
        if differing:
            raise ModelMismatchError(
                f"checkpoint {str(self.path)!r} is of another model: {differing} differ; build "
                "the model as before or choose another checkpoint"
            )
        return [(state[name], value) for name, value in values.items()]


def _check_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Raise FileFormatError if a parameter is not finite; a buffer may hold what it likes."""
    buffers = {name for name, _ in model.named_buffers()}
    for name in values.keys() - buffers:
        check_finite(name, values[name])


def _alike(value: Tensor, tensor: Tensor) -> bool:
    return value.shape == tensor.shape and value.dtype == tensor.dtype


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
