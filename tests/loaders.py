"""Loaders of many kinds: each gives what the plain list of its batches gives, or is refused."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from faults import OPTIONS, Outcome, network, pruned, same
from networks import batches, fingerprint
from nss_prune import ReadaptTrainer, profile
from nss_prune.errors import NSSPruneError
from points import alike

PAIRS = batches(48, (12,), 3)
INPUTS, LABELS = (torch.cat(column) for column in zip(*PAIRS, strict=True))
Pair = namedtuple("Pair", "inputs labels")


@dataclass
class Sample:
    """A batch as an object, which no part of torch takes apart."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Kind:
    """A kind of loader.

    Attributes:
        make: A fresh one.
        same_as: The batches that it gives, in every pass; None where it is to be refused.
        passes: How often it can be gone through.
        error: What it raises itself, which goes on as it is.
    """

    make: Callable[[], Any]
    same_as: list[tuple[Any, Any]] | None = None
    passes: float = float("inf")
    error: type[Exception] | None = None


class Repeated:
    """What a function of nothing yields, in every pass anew; with any length, or none."""

    def __init__(self, make: Callable[[], Any], length: int | None = None) -> None:
        self.make, self.length = make, length

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("of no length")
        return self.length


class Streamed(IterableDataset):
    """Samples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return zip(INPUTS, LABELS, strict=True)


class StreamedOfLength(Streamed):
    """Samples whose number is known."""

    def __len__(self) -> int:
        return len(INPUTS)


class Transformed(Dataset):
    """Samples that go through a function, as pictures do."""

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return self.transform(INPUTS[place]), LABELS[place]


def _twice(sample: Tensor) -> Tensor:
    return 2 * sample


def _loader(dataset: Any = None, **options: Any) -> DataLoader:
    dataset = TensorDataset(INPUTS, LABELS) if dataset is None else dataset
    if "batch_sampler" not in options:
        options = {"batch_size": 16} | options
    return DataLoader(dataset, **options)


def _collated(change: Callable[[Tensor, Tensor], Any]) -> DataLoader:
    def collate(samples: list[Any]) -> Any:
        inputs, labels = zip(*samples, strict=True)
        return change(torch.stack(inputs), torch.stack(labels))

    return _loader(collate_fn=collate)


def _drawn() -> Any:
    """The same draw in every pass."""
    generator = torch.Generator()
    weights = torch.linspace(1, 2, 48)
    sampler = WeightedRandomSampler(weights.tolist(), 48, generator=generator)
    loader = _loader(sampler=sampler)

    def begin() -> Any:
        generator.manual_seed(3)
        return loader

    return Repeated(begin, 3)


def _reusing() -> Iterator[Any]:
    """One tensor for the inputs of all batches, as some fast loaders have."""
    inputs, labels = torch.empty_like(PAIRS[0][0]), torch.empty_like(PAIRS[0][1])
    for own, classes in PAIRS:
        inputs.copy_(own)
        labels.copy_(classes)
        yield inputs, labels


def _raising(error: Exception | None = None) -> Iterator[Any]:
    yield from PAIRS[:2]
    if error is not None:
        raise error
    yield next(iter(()))  # a StopIteration, of which Python makes a RuntimeError


def _split(sizes: list[int]) -> list[Any]:
    return list(zip(INPUTS.split(sizes), LABELS.split(sizes), strict=True))


KINDS: dict[str, Kind] = {
    "tuple of batches": Kind(lambda: tuple(PAIRS), PAIRS),
    "batches as lists": Kind(lambda: [list(pair) for pair in PAIRS], PAIRS),
    "generator": Kind(lambda: iter(PAIRS), PAIRS, passes=1),
    "stream": Kind(lambda: _loader(Streamed()), PAIRS),
    "stream of a length": Kind(lambda: _loader(StreamedOfLength()), PAIRS),
    "tensors": Kind(_loader, PAIRS),
    "two workers": Kind(lambda: _loader(num_workers=2), PAIRS),
    "persistent workers": Kind(lambda: _loader(num_workers=1, persistent_workers=True), PAIRS),
    "pinned memory": Kind(lambda: _loader(pin_memory=True), PAIRS),
    "batch sampler": Kind(
        lambda: _loader(batch_sampler=BatchSampler(SequentialSampler(INPUTS), 16, False)), PAIRS
    ),
    "distributed sampler": Kind(
        lambda: _loader(
            sampler=DistributedSampler(INPUTS, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        ),
        PAIRS,
    ),
    "weighted sampler": Kind(_drawn, list(_drawn())),
    "dropped last": Kind(lambda: _loader(batch_size=20, drop_last=True), _split([20, 20, 8])[:2]),
    "unbatched": Kind(lambda: _loader(PAIRS, batch_size=None), PAIRS),
    "cut from an endless one": Kind(
        lambda: Repeated(lambda: itertools.islice(itertools.cycle(PAIRS), 5)),
        [*PAIRS, *PAIRS[:2]],
    ),
    "no length": Kind(lambda: Repeated(lambda: PAIRS), PAIRS),
    "too great a length": Kind(lambda: Repeated(lambda: PAIRS, 30), PAIRS),
    "too small a length": Kind(lambda: Repeated(lambda: PAIRS, 1), PAIRS),
    "a last batch of one": Kind(lambda: _split([20, 27, 1]), _split([20, 27, 1])),
    "one sample a batch": Kind(lambda: _loader(batch_size=1), _split([1] * 48)),
    "transforms": Kind(lambda: _loader(Transformed(_twice)), [(2 * x, y) for x, y in PAIRS]),
    "dict of inputs": Kind(lambda: _collated(lambda x, y: ({"input": x}, y)), PAIRS),
    "named tuple": Kind(lambda: _collated(Pair), PAIRS),
    "nested tuple": Kind(lambda: _collated(lambda x, y: ((x,), y)), PAIRS),
    "reused tensors": Kind(lambda: Repeated(_reusing, 3), PAIRS),
    "labels of another type": Kind(lambda: [(x, y.int()) for x, y in PAIRS], PAIRS),
    "labels as a list": Kind(lambda: [(x, y.tolist()) for x, y in PAIRS], PAIRS),
    "strided inputs": Kind(lambda: [(x.t().contiguous().t(), y) for x, y in PAIRS], PAIRS),
    "inputs with gradients": Kind(
        lambda: [(x.clone().requires_grad_(), y) for x, y in PAIRS], PAIRS
    ),
    "inputs of another type": Kind(lambda: [(x.float(), y) for x, y in PAIRS]),
    "inputs of another width": Kind(lambda: [(x[:, :5], y) for x, y in PAIRS]),
    "numpy inputs": Kind(lambda: [(x.numpy(), y.numpy()) for x, y in PAIRS]),
    "dataclass": Kind(lambda: _collated(Sample)),
    "dict with labels": Kind(lambda: _collated(lambda x, y: {"input": x, "labels": y})),
    "three items": Kind(lambda: _collated(lambda x, y: (x, y, torch.arange(len(y))))),
    "empty": Kind(list),
    "an empty batch": Kind(lambda: [*PAIRS, (INPUTS[:0], LABELS[:0])]),
    "no batches, but samples": Kind(lambda: list(zip(INPUTS, LABELS, strict=True))),
    "raises at the third batch": Kind(
        lambda: Repeated(lambda: _raising(OSError("the disk is gone"))), error=OSError
    ),
    "stops within a generator": Kind(lambda: Repeated(_raising), error=RuntimeError),
}


def _stepped(options: dict[str, Any]) -> Callable[[nn.Module, Any], Any]:
    return lambda model, data: pruned(model, data, **options) and None


def _profiled(model: nn.Module, data: Any) -> Any:
    found = profile(model, data, progress=False)
    return {"contributions": found.contributions, "samples": list(found.samples)}


def _trained(model: nn.Module, data: Any) -> Any:
    trainer = ReadaptTrainer(model, None, None, train="all", progress=False)
    return list(trainer.fit(data, epochs=2).losses)


USES: dict[str, tuple[Callable[[nn.Module, Any], Any], int]] = {
    "theta": (_stepped(OPTIONS[0]), 1),
    "budget": (_stepped(OPTIONS[1]), 1),
    "refit and balance": (_stepped(OPTIONS[2]), 5),
    "profile": (_profiled, 1),
    "training": (_trained, 3),
}
"""A function of a model and data, and how often it goes through the data at least."""


@functools.cache
def _expected(kind: str, use: str) -> tuple[Any, Any]:
    model = network()
    torch.manual_seed(0)
    return USES[use][0](model, KINDS[kind].same_as), model.state_dict()


def of_a_loader(number: int, folder: Path) -> Outcome:
    """What a kind of loader comes to in one of its uses."""
    kinds, uses = list(KINDS), list(USES)
    return used(kinds[number // len(uses) % len(kinds)], uses[number % len(uses)])


def used(name: str, use: str) -> Outcome:
    """Whether a loader gives what the plain list gives, or is refused with nothing changed."""
    kind, (function, passes) = KINDS[name], USES[use]
    model = network()
    before = fingerprint(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            given = function(model, kind.make())
        except Exception as error:
            return _refused(kind, passes, error, same(before, fingerprint(model)), f"{name}, {use}")
        if kind.same_as is None or kind.passes < passes:
            return "wrong", f"{name}, {use}: it is taken"
        expected, state = _expected(name, use)
    if not alike(given, expected) or not alike(dict(model.state_dict()), dict(state)):
        return "wrong", f"{name}, {use}: another result than that of the list"
    return "survived", ""


def _refused(kind: Kind, passes: int, error: Exception, intact: bool, what: str) -> Outcome:
    own = kind.error is not None and type(error) is kind.error
    if not own and not isinstance(error, NSSPruneError):
        return "foreign", f"{what}: {error!r}"
    if not intact:
        return "wrong", f"{what}: the model is changed by {error!r}"
    if kind.same_as is not None and kind.passes >= passes:
        return "wrong", f"{what}: it is refused: {error}"
    return "refused", ""
