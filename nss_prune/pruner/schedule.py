"""The passes of a step, known beforehand: how many, how long, and what they keep in memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nss_prune.core.batches import first_batch, length, split_batch
from nss_prune.core.models import device_of, evaluation
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.core.progress import TITLES, Progress
from nss_prune.core.thread_state import outside_inference_mode
from nss_prune.pruner.subject import Subject

FORWARD, BACKWARD = 1.0, 3.0  # what a pass takes, in forward passes


@dataclass(frozen=True)
class Stage:
    """Passes of one kind.

    Attributes:
        name: As of :data:`nss_prune.core.progress.TITLES`.
        passes: Over the data.
        weight: What one takes, in forward passes over the same data.
        bytes: Of the sums that a pass keeps at once.
        seconds: All passes; None where the number of batches is not known.
    """

    name: str
    passes: int
    weight: float
    bytes: int = 0
    seconds: float | None = None

    def __str__(self) -> str:
        title = TITLES.get(self.name, self.name)
        taken = "?" if self.seconds is None else f"{self.seconds:.1f} s"
        return f"{title:26} {self.passes:3} passes {taken:>10} {self.bytes / 2**20:10,.1f} MiB"


@dataclass(frozen=True)
class Schedule:
    """The passes of a step; print it.

    Attributes:
        stages: In their order.
        batches: Of each pass; None where that is not known.
        seconds_per_batch: Of a forward pass over the batch that was timed.
    """

    stages: tuple[Stage, ...]
    batches: int | None
    seconds_per_batch: float

    @property
    def seconds(self) -> float | None:
        """All stages; None where the number of batches is not known."""
        return None if self.batches is None else sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def bytes(self) -> int:
        """The most that is kept at once."""
        return max((stage.bytes for stage in self.stages), default=0)

    def __str__(self) -> str:
        taken = "?" if self.seconds is None else f"{self.seconds:.1f} s"
        passes = sum(stage.passes for stage in self.stages)
        total = f"{'all':26} {passes:3} passes {taken:>10} {self.bytes / 2**20:10,.1f} MiB at most"
        return "\n".join([*map(str, self.stages), total])


def stages_of(strategy: Any, repairs: Iterable[Any], subject: Subject) -> tuple[Stage, ...]:
    """What a strategy and the repairs tell of their passes; one that tells nothing has none."""
    found: list[Stage] = list(getattr(strategy, "stages", lambda subject: ())(subject))
    for repair in repairs:
        found += getattr(repair, "stages", lambda subject, before: ())(subject, tuple(found))
    return tuple(found)


@outside_inference_mode
def schedule(
    strategy: Any, repairs: Iterable[Any], subject: Subject, data: Iterable[Any] | None
) -> Schedule:
    """The passes, with seconds by one batch that is run forward; the model is left as found."""
    example = [subject.example_inputs]
    shown = example if data is None or isinstance(data, Iterator) else data
    batches = 1 if data is None else length(data)
    inputs = split_batch(first_batch(shown, device_of(subject.model))[0])[0]
    seconds = _forward_seconds(subject, inputs)
    found = stages_of(strategy, repairs, subject)
    if batches is not None:
        found = tuple(
            replace(stage, seconds=stage.passes * stage.weight * batches * seconds)
            for stage in found
        )
    return Schedule(found, batches, seconds)


@contextlib.contextmanager
def showing(
    strategy: Any, repairs: Iterable[Any], subject: Subject, progress: bool | None
) -> Iterator[None]:
    """One progress bar over the passes of a step."""
    stages = stages_of(strategy, repairs, subject)
    passes = [(stage.name, stage.weight) for stage in stages for _ in range(stage.passes)]
    with Progress(passes, progress).running():
        yield


def kept_bytes(sizes: Sequence[int], limit: float) -> int:
    """What sums keep that go through as many passes as the limit asks for."""
    return int(min(sum(sizes), max([limit, *sizes])))


def _forward_seconds(subject: Subject, inputs: Any) -> float:
    """Of a call with a batch, after one with a sample of it."""
    with evaluation(subject.model), torch.no_grad():
        subject.forward(subject.model, map_tensors(lambda tensor: tensor[:1], inputs))
        begin = time.perf_counter()
        outputs = subject.forward(subject.model, inputs)
        for tensor in tensors_in(outputs)[:1]:
            tensor.reshape(-1)[:1].tolist()  # waits for the device
        return time.perf_counter() - begin
