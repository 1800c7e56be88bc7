"""What a report shows besides counts: divergence, sensitivities, seconds, memory, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from nss_prune.graph.slices import Slice

Sensitivity = Mapping[str, Mapping[float, float]]
"""Layer -> share of its neurons that goes -> divergence that this alone causes, in nats."""


@dataclass(frozen=True)
class Figures:
    """Figures of a step, as far as they are known.

    Attributes:
        cost: What the budget is a share of.
        kept: Share of it that is kept, in (0, 1].
        divergence: Predicted divergence of the outputs, nats a sample.
        curve: (share of the cost kept, predicted divergence) of other budgets, ascending.
        sensitivity: Of each layer alone.
        categories: Layer -> category -> share of its contribution that the kept neurons carry.
        seconds: Stage -> seconds that it took.
        memory: Stage -> bytes by which it raised the peak of the process, or of the GPU.
        latency: Seconds of a call with the example inputs, before and after: the median of
            calls in turns, measured when they are first read (:mod:`nss_prune.core.late_timing`).
        accuracy: Share of the samples that are right, before and after.
        command: What made the model.
        versions: Package -> version.
    """

    cost: str = ""
    kept: float | None = None
    divergence: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    sensitivity: Sensitivity = field(default_factory=dict)
    categories: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    latency: Sequence[float] | None = None
    accuracy: tuple[float, float] | None = None
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Figures:
        """From what :meth:`to_dict` gave, after JSON too; what is not known is left out."""
        known = {item.name for item in fields(Figures)}
        own = {name: value for name, value in values.items() if name in known}
        own["curve"] = tuple((float(x), float(y)) for x, y in own.get("curve", ()))
        own["sensitivity"] = {
            layer: {float(share): float(nats) for share, nats in by_share.items()}
            for layer, by_share in own.get("sensitivity", {}).items()
        }
        for name in ("latency", "accuracy"):
            own[name] = tuple(own[name]) if own.get(name) else None
        return Figures(**own)


def combined(steps: tuple[Figures, ...]) -> Figures:
    """The figures of several steps together: sums of nats, seconds and bytes, first to last."""
    first, last = steps[0], steps[-1]
    nats = [step.divergence for step in steps]
    return Figures(
        cost=last.cost,
        kept=last.kept,
        divergence=None if None in nats else sum(value for value in nats if value is not None),
        curve=first.curve,
        sensitivity=first.sensitivity,
        categories=last.categories,
        seconds=_sums([step.seconds for step in steps]),
        memory={name: int(size) for name, size in _sums([step.memory for step in steps]).items()},
        latency=_first_and_last(first.latency, last.latency),
        accuracy=_first_and_last(first.accuracy, last.accuracy),
        command=last.command,
        versions=last.versions,
    )


def _sums(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Stage -> the sum over the steps that have it."""
    stages = dict.fromkeys(name for step in steps for name in step)
    return {name: sum(step.get(name, 0) for step in steps) for name in stages}


def _first_and_last(
    first: Sequence[float] | None, last: Sequence[float] | None
) -> tuple[float, float] | None:
    return None if first is None or last is None else (first[0], last[1])


def category_shares(
    chosen: Slice, contributions: Mapping[str, Tensor], categories: tuple[tuple[Any, ...], ...]
) -> dict[str, dict[str, float]]:
    """Layer -> category -> Σ |contribution| of the neurons kept, over that of all neurons.

    Args:
        contributions: Layer -> ``[categories, neurons]``.
        categories: The labels that count as one, of each category.
    """
    names = ["+".join(map(str, part)) for part in categories]
    table = {}
    for layer, kept in chosen.kept.items():
        if layer not in contributions:
            continue
        sizes = contributions[layer].abs().double().cpu()
        whole = sizes.sum(1)
        shares = (sizes[:, kept.cpu()].sum(1) / whole).where(whole > 0, whole.new_ones(()))
        table[layer] = dict(zip(names, shares.tolist(), strict=True))
    return table
