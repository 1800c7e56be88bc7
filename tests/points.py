"""Faults at every point of an operation: whatever is raised, all is as before or wholly done."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

from faults import Outcome, same
from networks import batches, cnn, fingerprint, mlp, settled
from nss_prune import (
    IncrementalTrainer,
    NSSPruner,
    Profile,
    ReadaptTrainer,
    Slice,
    finetune,
    load_pruned,
    profile,
    save_pruned,
    sparsify,
)
from nss_prune.adaptation.attacks import FGSM
from nss_prune.errors import NSSPruneError
from nss_prune.unstructured import load_masks, save_masks
from tracer import Points


class Fault(RuntimeError):
    """What torch and the system raise most."""


@dataclass
class Work:
    """What an operation works on.

    Attributes:
        model: Whose bits, flags and hooks count.
        folder: Whose files count.
        known: Whatever else it needs.
    """

    model: nn.Module
    folder: Path
    known: Any = None
    results: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Operation:
    """Something that this library does.

    Attributes:
        prepare: Makes the same work in any empty folder.
        act: Does it, and returns what it gives, in tensors and plain values.
        read: Loads a file that it writes; None where it writes none.
    """

    prepare: Callable[[Path], Work]
    act: Callable[[Work], Any]
    read: Callable[[Path], Any] | None = None


def _perceptron(folder: Path) -> Work:
    torch.manual_seed(0)
    return Work(mlp(), folder)


def _convolutions(folder: Path) -> Work:
    torch.manual_seed(0)
    return Work(settled(cnn(), torch.randn(16, 3, 12, 12).double()), folder)


def _data(model: nn.Module) -> list[Any]:
    return batches(48, (3, 12, 12), 5) if _is_wide(model) else batches(48, (12,), 3)


def _is_wide(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def _pruner(work: Work, **options: Any) -> NSSPruner:
    data = _data(work.model)
    example = torch.zeros_like(data[0][0][:2])
    return NSSPruner(work.model, example, data=data, progress=False, **options)


def _stepping(
    prepare: Callable[[Path], Work], constructed: bool = False, **options: Any
) -> Operation:
    """A step of a pruner that is made before, or within the operation."""

    def ready(folder: Path) -> Work:
        work = prepare(folder)
        work.known = None if constructed else _pruner(work, **options)
        return work

    def act(work: Work) -> Any:
        pruner = _pruner(work, **options) if constructed else work.known
        pruner.step()
        return dict(pruner.slice.kept)

    return Operation(ready, act)


def _profiling(work: Work) -> Any:
    found = profile(
        work.model, _data(work.model), metrics=("taylor", "var"), keep_statistics=True,
        progress=False,
    )  # fmt: skip
    return {"contributions": found.contributions, "curves": found.curves}


def _with(made: Callable[[Work], Any], prepare: Callable[[Path], Work] = _perceptron) -> Any:
    def ready(folder: Path) -> Work:
        work = prepare(folder)
        work.known = made(work)
        return work

    return ready


def _profile(work: Work) -> Profile:
    return profile(work.model, _data(work.model), keep_statistics=True, progress=False)


def _slice(work: Work) -> Slice:
    return _profile(work).slice(0.8)


def _saved(work: Work) -> None:
    torch.manual_seed(0)
    smaller = mlp()
    pruner = NSSPruner(
        smaller, torch.zeros(2, 12).double(), data=_data(smaller), theta=0.8, progress=False
    )
    save_pruned(smaller, work.folder / "old")
    pruner.step()
    save_pruned(smaller, work.folder / "model")


def _saving(work: Work) -> None:
    save_pruned(work.model, work.folder / "file")


def _loading(work: Work) -> None:
    load_pruned(work.folder / "model", work.model)


def _readapting(work: Work, **options: Any) -> Any:
    torch.manual_seed(0)
    given = {"attack": FGSM(0.1, bounds=None)} | options
    trainer = ReadaptTrainer(work.model, work.known, progress=False, **given)
    result = trainer.fit(batches(24, (12,), 3), epochs=2, checkpoint=work.folder / "file")
    return {"losses": result.losses, "tpr": result.tpr, "ra": result.ra, "raa": result.raa}


def _trainer(work: Work) -> IncrementalTrainer:
    torch.manual_seed(0)
    first = _slice(work)
    return IncrementalTrainer(
        work.model, first, classes=(0, 1, 2), theta=0.9, progress=False,
        data=batches(24, (12,), 3),
    )  # fmt: skip


def _learning(work: Work) -> Any:
    torch.manual_seed(0)
    data = [(inputs, labels + 3) for inputs, labels in batches(24, (12,), 2, seed=1)]
    task = work.known.fit(data, epochs=1)
    return {**task.slice.kept, "classes": task.classes}


def _tuning(work: Work) -> Any:
    torch.manual_seed(0)
    result = finetune(
        work.model, batches(24, (12,), 3), work.known, validation=batches(24, (12,), 3, seed=3),
        epochs=2, mixup=0.2, ema=0.9, progress=False, checkpoint=work.folder / "file",
    )  # fmt: skip
    return [one["loss"] for one in result.history]


def _whole(work: Work) -> nn.Module:
    torch.manual_seed(5)
    return mlp()


def _sparsifying(work: Work) -> None:
    sparsify(work.model, 0.5)


def _sparse(folder: Path) -> Work:
    work = _perceptron(folder)
    sparsify(work.model, 0.5)
    return work


def _reading_masks(path: Path) -> Any:
    return load_masks(path, mlp())


OPERATIONS: dict[str, Operation] = {
    "profile": Operation(_perceptron, _profiling),
    "constructor and theta": _stepping(_perceptron, True, theta=0.8),
    "theta": _stepping(_perceptron, theta=0.8),
    "budget": _stepping(_perceptron, params_budget=0.6),
    "constructor and budget": _stepping(_convolutions, True, macs_budget=0.6, recalibrate=True),
    "refit and balance": _stepping(_convolutions, theta=0.8, fold="refit", balance=True),
    "recalibration": _stepping(_convolutions, theta=0.8, recalibrate=True),
    "ratio": _stepping(_perceptron, True, pruning_ratio=0.4, strategy="global"),
    "save": Operation(_perceptron, _saving, lambda path: load_pruned(path, mlp())),
    "save a profile": Operation(
        _with(_profile),
        lambda work: work.known.save(work.folder / "file", statistics=True),
        Profile.load,
    ),
    "save a slice": Operation(
        _with(_slice), lambda work: work.known.save(work.folder / "file"), Slice.load
    ),
    "load": Operation(_with(_saved), _loading),
    "readapt": Operation(_with(_slice), _readapting),
    "readapt all": Operation(_perceptron, lambda work: _readapting(work, attack=None, train="all")),
    "incremental": Operation(_with(_trainer), _learning),
    "finetune": Operation(_with(_whole), _tuning),
    "sparsify": Operation(_perceptron, _sparsifying),
    "save masks": Operation(
        _sparse, lambda work: save_masks(work.folder / "file", work.model), _reading_masks
    ),
}


def surroundings() -> dict[str, Any]:
    """What a process has that no operation may leave otherwise."""
    module = torch.nn.modules.module
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "global hooks": [len(module._global_forward_hooks), len(module._global_forward_pre_hooks)],
        "modes": [len(function_modes()), len(dispatch_modes())],
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "products": torch.get_float32_matmul_precision(),
        "filters": len(warnings.filters),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "numpy": int(np.random.get_state()[1].sum()),
        "dtype": torch.get_default_dtype(),
    }


def seen(work: Work) -> dict[str, Any]:
    """What must be as before, or as it is when all is done."""
    found, known = fingerprint(work.model), work.known
    if isinstance(known, NSSPruner):
        found["pruner"] = [known.current_step, known.report is None, known._stale]
    if isinstance(known, IncrementalTrainer):
        found["trainer"] = [len(known.tasks), len(known._data), *sorted(known._validations)]
    return found


def alike(first: Any, second: Any) -> bool:
    """Whether results are the same but for rounding in float64."""
    if isinstance(first, Tensor) and first.is_floating_point():
        return first.shape == second.shape and torch.allclose(first, second, rtol=1e-9, atol=1e-12)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(alike(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(alike, first, second))
    return first == pytest.approx(second) if isinstance(first, float) else same(first, second)


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    """What two models may be compared by."""
    return {key: value for key, value in found.items() if key != "objects"}


@functools.cache
def unbroken(name: str) -> tuple[dict[str, Any], Any, dict[bool, list[str]]]:
    """What an operation comes to, what it gives, and its points, also with those of all threads."""
    operation, points = OPERATIONS[name], Points()
    for watched in (contextlib.nullcontext, points.watched):  # first whatever it imports
        with tempfile.TemporaryDirectory() as folder:
            work = operation.prepare(Path(folder))
            with watched():
                value = operation.act(work)
    return seen(work), value, {True: points.seen, False: points.own}


@functools.cache
def _by_place(name: str, everywhere: bool) -> dict[str, list[int]]:
    """Place -> numbers of the points there."""
    found = defaultdict(list)
    for number, place in enumerate(unbroken(name)[2][everywhere]):
        found[place].append(number)
    return dict(found)


def at_a_point(number: int, folder: Path) -> Outcome:
    """Whatever is raised at one point: all is as before, or done, and can be done again.

    Of even numbers, any point of the operation is as likely as another, of odd ones any place in
    the source that it comes to.
    """
    names = list(OPERATIONS)
    name, draw = names[number // 2 % len(names)], random.Random(number)
    interrupt = draw.random() < 0.5
    error: BaseException = KeyboardInterrupt("a fault") if interrupt else Fault("a fault")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, value, points = unbroken(name)
        if number % 2:
            point = draw.choice(draw.choice(list(_by_place(name, not interrupt).values())))
        else:
            point = draw.randrange(len(points[not interrupt]))
        return raised(name, Points(point, error, not interrupt), folder, expected, value)


def raised(
    name: str, points: Points, folder: Path, expected: dict[str, Any], value: Any
) -> Outcome:
    """What an operation comes to when the points raise their exception."""
    operation = OPERATIONS[name]
    work = operation.prepare(folder)
    before, around = seen(work), surroundings()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    given, why, caught = None, "", None
    try:
        with points.watched():
            given = operation.act(work)
    except BaseException as error:
        caught = error
        why = _left(operation, work, before, around, expected)
    if points.place is None:
        return ("survived", "") if same(given, value) else ("wrong", f"{name}: another result")
    what = f"{name}: {points.error!r} at point {points.number}, {points.place}"
    if caught is None:
        why = _swallowed(points, work, expected, given, value)
    elif not _told(caught, points.error):
        why = why or f"it became {caught!r}"
    del caught
    torch.set_grad_enabled(around["gradients"])  # for the trials behind this one
    whole = same(lasting(seen(work)), lasting(expected)) and given is not None
    if not why and not whole and same(before, seen(work)):
        why = _again(operation, work, expected, value, files)
    return ("wrong", f"{what}: {why}") if why else ("refused" if given is None else "survived", "")


def _told(caught: BaseException, error: BaseException | None) -> bool:
    """Whether an error says what was raised; an interrupt stays one."""
    if isinstance(error, KeyboardInterrupt):
        return isinstance(caught, KeyboardInterrupt)
    return caught is error or (isinstance(caught, NSSPruneError) and str(error) in str(caught))


def _left(
    operation: Operation,
    work: Work,
    before: dict[str, Any],
    around: dict[str, Any],
    expected: dict[str, Any],
) -> str:
    """What is not as before while the error is still held, or ""."""
    after, now = seen(work), surroundings()
    done = same(lasting(after), lasting(expected))
    if not done and not same(before, after):
        differing = [key for key in before if not same(before[key], after[key])]
        return f"the model has other {differing}"
    others = {key: (around[key], now[key]) for key in now if now[key] != around[key]}
    return f"left otherwise: {others}" if others else ""


def _swallowed(points: Points, work: Work, expected: dict[str, Any], given: Any, value: Any) -> str:
    """What is wrong with a result in spite of an error, or ""."""
    if isinstance(points.error, KeyboardInterrupt) and points.dropped is None:
        return "the interrupt was lost"
    if alike(lasting(seen(work)), lasting(expected)) and alike(given, value):
        return ""  # by another way, such as an optimiser that rounds elsewhere
    pruner = work.known
    told = str(points.error) in str(getattr(pruner, "report", ""))
    return "" if told else "it was swallowed, and the result is another"


def _again(
    operation: Operation, work: Work, expected: dict[str, Any], value: Any, files: dict[str, bytes]
) -> str:
    """What is wrong with a second attempt, or ""."""
    for path in work.folder.iterdir():
        if path.name in files and path.read_bytes() != files[path.name]:
            return f"{path.name} is another"
        if path.name not in files and path.name != "file":
            return f"{path.name} is left behind"
        if path.name == "file" and operation.read is not None:
            operation.read(path)
    given = operation.act(work)
    if not same(lasting(seen(work)), lasting(expected)) or not same(given, value):
        return "a second attempt comes to something else"
    return ""
