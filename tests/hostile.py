"""Files of every kind, and what can be wrong with them: cut, flipped, and crafted with right sums.

A crafted file has the digest of what it holds, so that only the checks of its contents stand
between it and whoever loads it. It is hostile unless all that was changed are facts in ``FREE``,
which nothing else in the file tells, and each is another value of the same kind.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from networks import batches, fingerprint, mlp
from nss_prune import (
    NSSPruner,
    Profile,
    ReadaptTrainer,
    Slice,
    load_pruned,
    profile,
    save_pruned,
    sparsify,
)
from nss_prune.adaptation.tasks import Task
from nss_prune.core.files import write_file
from nss_prune.errors import NSSPruneError
from nss_prune.unstructured import Iterations, iterative_sparsify, load_masks, save_masks

WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "a" * 20_000,
    [], [[]], {}, {"x": 1}, [0] * 40, [-1], [2**62, 2**62], ["x", "x"],
)  # fmt: skip


FREE = tuple(
    re.compile(pattern)
    for pattern in (
        r"notes\.history\[\d+\]\.(?!epoch)\w+",  # what was measured in an epoch, a validation's too
        r"options\[\d+\]\.(lr|foreach|fused|capturable|differentiable)",
        r"start\.last\.(seconds|accuracy)",
        r"rule|name|left_alone\.\d+|notes\[\d+\]",  # texts for people
        r"classes\[\d+\]",  # another class of as many outputs
        r"used|unused|left_alone_sizes\.\d+|statistics\.landscape\.positions",
        r"statistics\.sums\[\d+\]\[2\]\.\d+",  # how many positions were seen
        r"groups\[\d+\]\[2\]\[\d+\]\[5\]",  # the axis of the samples, where activations are made
    )
)
"""Places in notes."""

OPTIONAL = re.compile(
    r"rule|ranked_by|used|unused|statistics\.drawn|groups.*\[5\]|modules\..*\.numbers\.further"
    r"|notes\.history\[\d+\]\.further|classes\[\d+\]"
)
"""What a file may lack, as those of earlier versions do, or have: a validation's metric, a
class, and an attribute that the model lacks and does not get."""

MISSING = object()


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        write: Writes one to a path.
        load: Loads it, perhaps into a model.
        use: Does with what was loaded what a user does with it.
        save: Writes what was loaded, if that is possible.
    """

    write: Callable[[Path], None]
    load: Callable[[Path, nn.Module], Any]
    use: Callable[[Any, nn.Module], Any] = lambda loaded, model: None
    save: Callable[[Any, Path], None] | None = None


def _perceptron() -> nn.Module:
    torch.manual_seed(0)
    return mlp()


def _profile(statistics: bool = False) -> Profile:
    return profile(
        _perceptron(), batches(48, (12,), 3), metrics=("taylor", "var"), keep_statistics=statistics
    )


def _use_profile(loaded: Profile, model: nn.Module) -> None:
    repr(loaded)
    _use_slice(loaded.slice(0.9), model)
    Profile.merge([loaded, loaded])


def _use_slice(loaded: Slice, model: nn.Module) -> None:
    repr(loaded)
    loaded._repr_html_()
    with loaded.masked(model):
        model(torch.randn(2, 12).double())


def _use_task(loaded: Task, model: nn.Module) -> None:
    repr(loaded)
    with loaded.inference(model, "5", masked=True):
        model(torch.randn(2, 12).double())


def _use_pruned(loaded: nn.Module, model: nn.Module) -> None:
    model(torch.randn(2, 12).double())
    assert not any(hasattr(module, "further") for module in model.modules())


def _write_pruned(path: Path) -> None:
    model = _perceptron()
    NSSPruner(model, torch.randn(48, 12).double(), theta=0.8, data=batches(48, (12,), 3)).step()
    save_pruned(model, path)


def _write_masks(path: Path) -> None:
    model = _perceptron()
    sparsify(model, 0.5)
    save_masks(path, model)


def _write_task(path: Path) -> None:
    weights = {"1.weight": torch.rand(16, 12) < 0.5}
    Task("first", _profile().slice(0.8), (0, 2), 3, weights).save(path)


def _iterate(path: Path, model: nn.Module, count: int) -> None:
    list(
        iterative_sparsify(model, 0.2, until=Iterations(count), checkpoint=path, finetune=_nothing)
    )


def _nothing(model: nn.Module) -> None:
    """A fine-tuning that changes nothing."""


def _train(path: Path, model: nn.Module, epochs: int, resume: bool) -> None:
    trainer = ReadaptTrainer(model, None, None, train="all", progress=False)
    trainer.fit(batches(24, (12,), 3), epochs=epochs, checkpoint=path, resume=resume)


KINDS = {
    "profile": Kind(
        lambda path: _profile(True).save(path, statistics=True),
        lambda path, _: Profile.load(path),
        _use_profile,
        lambda loaded, path: loaded.save(path, statistics=loaded.statistics is not None),
    ),
    "slice": Kind(
        lambda path: _profile().slice(0.8).save(path),
        lambda path, _: Slice.load(path),
        _use_slice,
        Slice.save,
    ),
    "task": Kind(_write_task, lambda path, _: Task.load(path), _use_task, Task.save),
    "masks": Kind(_write_masks, load_masks),
    "pruned": Kind(_write_pruned, load_pruned, _use_pruned),
    "iterations": Kind(
        lambda path: _iterate(path, _perceptron(), 1), lambda path, model: _iterate(path, model, 1)
    ),
    "training": Kind(
        lambda path: _train(path, _perceptron(), 1, False),
        lambda path, model: _train(path, model, 2, True),
    ),
}


def contents(path: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Kind, tensors and notes of a file."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return header["kind"], tensors, json.loads(header["notes"])


def places(notes: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in decoded JSON."""
    items = notes.items() if isinstance(notes, dict) else enumerate(notes)
    for key, value in list(items):
        yield notes, key
        if isinstance(value, (dict, list)):
            yield from places(value)


@dataclass(frozen=True)
class Crafted:
    """What was changed in a file.

    Attributes:
        what: In words.
        hostile: Whether something is not as this library could have written it.
    """

    what: str
    hostile: bool


def crafted(path: Path, seed: int) -> Crafted:
    """Change one or two things in a file, with the right digest."""
    draw = random.Random(seed)
    kind, old_tensors, old_notes = contents(path)
    while True:
        tensors, notes, done = dict(old_tensors), copy.deepcopy(old_notes), []
        for _ in range(draw.choice((1, 1, 1, 2))):
            change = draw.choice(
                (_value, _value, _value, _number, _missing, _added, _tensor, _tensor)
            )
            done.append(change(draw, tensors, notes))
        changed = list(differences(old_notes, notes))
        same = tensors.keys() == old_tensors.keys() and all(
            tensors[name] is old_tensors[name] for name in tensors
        )
        if changed or not same:
            break
    write_file(path, kind, tensors, notes)
    return Crafted("; ".join(done), not same or not all(_is_free(*each) for each in changed))


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, old value, new value) of all that differs in decoded JSON, MISSING for none."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            deeper = f"{place}.{key}" if place else str(key)
            yield from differences(old.get(key, MISSING), new.get(key, MISSING), deeper)
    elif isinstance(old, list) and isinstance(new, list):
        for number in range(max(len(old), len(new))):
            pair = (each[number] if number < len(each) else MISSING for each in (old, new))
            yield from differences(*pair, f"{place}[{number}]")
    elif old != new or isinstance(old, bool) != isinstance(new, bool):
        yield place, old, new


def _is_free(place: str, old: Any, new: Any) -> bool:
    if MISSING in (old, new):
        return OPTIONAL.fullmatch(place) is not None
    return any(pattern.fullmatch(place) for pattern in FREE) and (
        _sort(old) == _sort(new) or place == "start.last.accuracy"
    )


def _sort(value: Any) -> type:
    return float if type(value) is int else type(value)


def _value(draw: random.Random, tensors: dict[str, Tensor], notes: dict[str, Any]) -> str:
    holder, key = draw.choice(list(places(notes)))
    old, holder[key] = holder[key], copy.deepcopy(draw.choice(WRONG))
    return f"{key!r}: {str(old)[:40]} -> {str(holder[key])[:40]}"


def _number(draw: random.Random, tensors: dict[str, Tensor], notes: dict[str, Any]) -> str:
    found = [(h, k) for h, k in places(notes) if type(h[k]) in (int, float)]
    if not found:
        return _value(draw, tensors, notes)
    holder, key = draw.choice(found)
    old = holder[key]
    holder[key] = draw.choice((-old - 1, old + 1, old * 1000 + 7, 2**31, 2**40))
    return f"{key!r}: {old} -> {holder[key]}"


def _missing(draw: random.Random, tensors: dict[str, Tensor], notes: dict[str, Any]) -> str:
    if tensors and draw.random() < 0.4:
        name = draw.choice(sorted(tensors))
        del tensors[name]
        return f"no tensor {name!r}"
    holder, key = draw.choice(list(places(notes)))
    del holder[key]
    return f"no {key!r}"


def _added(draw: random.Random, tensors: dict[str, Tensor], notes: dict[str, Any]) -> str:
    if draw.random() < 0.4:
        tensors["further"] = torch.zeros(3)
        return "one more tensor"
    holders = [notes, *(h[k] for h, k in places(notes) if isinstance(h[k], (dict, list)))]
    holder = draw.choice(holders)
    if isinstance(holder, dict):
        holder["further"] = draw.choice(WRONG)
    else:
        holder.append(draw.choice((*WRONG, *holder)))
    return "one more value"


def _tensor(draw: random.Random, tensors: dict[str, Tensor], notes: dict[str, Any]) -> str:
    name = draw.choice(sorted(tensors))
    old = tensors[name]
    tensors[name] = draw.choice(
        (
            old.new_zeros(0),
            old[None],
            old.flatten()[:-1],
            torch.cat([old.flatten(), old.flatten()]),
            old.to(torch.complex64) if old.dtype != torch.complex64 else old[None],
            old.to(torch.int64),
            torch.full_like(old, float("nan")) if old.is_floating_point() else old[None],
        )
    )
    return f"tensor {name!r}: {old.dtype} {tuple(old.shape)} -> {tensors[name].dtype} " + str(
        tuple(tensors[name].shape)
    )


@dataclass
class Outcome:
    """What loading a wrong file came to.

    Attributes:
        refusal: The error of this library, or None.
        foreign: Any other exception, or None.
        damaged: Whether a model was changed by a file that was refused.
        other: Whether something else was loaded than the file says, as is seen by saving it again.
    """

    refusal: NSSPruneError | None = None
    foreign: BaseException | None = None
    damaged: bool = False
    other: bool = False

    @property
    def kind(self) -> str:
        """In one word, as results count it."""
        if self.foreign is not None:
            return "foreign"
        if self.damaged or self.other:
            return "wrong"
        return "survived" if self.refusal is None else "refused"


def attempt(kind: Kind, path: Path) -> Outcome:
    """Load a file into a fresh model."""
    model = _perceptron()
    before = fingerprint(model)
    outcome = Outcome()
    try:
        loaded = kind.load(path, model)
        kind.use(loaded, model)
        outcome.other = kind.save is not None and not _says_the_same(kind.save, loaded, path)
    except NSSPruneError as error:
        outcome.refusal = error
    except Exception as error:
        outcome.foreign = error
    if outcome.refusal or outcome.foreign:
        after = fingerprint(model)
        outcome.damaged = any(not _equal(before[key], after[key]) for key in before)
    return outcome


def _says_the_same(save: Callable[[Any, Path], None], loaded: Any, path: Path) -> bool:
    """Whether all that a file says is said by what was loaded, saved again."""
    again = path.with_name(f"{path.name} again")
    save(loaded, again)
    (_, tensors, notes), (_, saved, written) = contents(path), contents(again)
    same = all(old is MISSING for _, old, _ in differences(notes, written))
    return same and _equal(tensors, saved)


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return bool(torch.equal(first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_equal(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        pairs = zip(first, second, strict=False)
        return len(first) == len(second) and all(_equal(a, b) for a, b in pairs)
    return bool(first == second)
