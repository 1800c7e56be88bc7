"""What a slice makes the outputs diverge by on new samples, estimated from halves of the data.

Neurons are ordered and their consumers folded by the samples at hand. What diverges most are
samples that are unlike all others, and a new one is unlike these as well. So the same numbers of
neurons go by the order and the folding of either half, and the divergence is measured on the other.
The error of what is estimated from n samples is in proportion to 1 / n: with n / 2 samples the
divergence on new ones is D (1 + 2 x), with n it is D (1 + x), and on those n themselves D (1 − x).
So (measured on all + 2 measured on the other half) / 3 is that on new samples, which is taken to be
no less than on those at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from nss_prune.allocation.effects import LEAST_SAMPLES
from nss_prune.core.batches import has_samples, pick_samples, split_batch
from nss_prune.core.draws import Draws
from nss_prune.core.shards import without_padding
from nss_prune.core.views import Views
from nss_prune.graph.slices import Slice
from nss_prune.pruner.eliminating import Eliminating
from nss_prune.pruner.elimination_evidence import EliminationEvidence
from nss_prune.pruner.measuring import Measuring
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.subject import Subject


class Half:
    """Half of the samples of batches, by what they hold, so that their order does not matter.

    Args:
        data: Batches of (inputs, labels) that can be iterated again.
        which: 0 or 1.
    """

    def __init__(self, data: Iterable[Any], which: int) -> None:
        self._data = data
        self._which = which

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in without_padding(self._data):
            inputs, labels = split_batch(batch)
            second = Draws(inputs).uniform() >= 0.5
            chosen = (second == bool(self._which)).nonzero().flatten()
            if len(chosen):
                yield pick_samples(inputs, chosen), pick_samples(labels, chosen)


def halves_of(data: Iterable[Any] | None) -> tuple[Iterable[Any], ...]:
    """Both halves, views of a sample together; none where one has too few samples to measure."""
    if data is None or isinstance(data, Iterator):
        return ()
    halves = _both(data)
    return halves if all(has_samples(half, LEAST_SAMPLES) for half in halves) else ()


def _both(data: Iterable[Any]) -> tuple[Iterable[Any], ...]:
    if isinstance(data, Views):
        return tuple(Views(Half(data.data, which), *data.transforms) for which in (0, 1))
    return tuple(Half(data, which) for which in (0, 1))


class NewSamples:
    """Estimates the divergence of slices on new samples; in nats a sample.

    Args:
        subject: Its model is left as it is.
        evidence: By all samples, and with that by the halves, where these are large enough.
        eliminating: With the data, and what the outputs mean.
        repairs: Those after the removal are left out.
    """

    def __init__(
        self,
        subject: Subject,
        evidence: EliminationEvidence,
        eliminating: Eliminating,
        repairs: Sequence[Repair],
    ) -> None:
        self._own = Measuring(subject, evidence, eliminating, repairs)
        data = eliminating.data
        others = reversed(_both(data)) if evidence.halves and data is not None else ()
        self._halves = [
            (half, Measuring(subject, half, replace(eliminating, data=other), repairs))
            for half, other in zip(evidence.halves, others, strict=True)
        ]

    @property
    def possible(self) -> bool:
        """Whether the data can be read again, and has enough samples."""
        return self._own.possible

    def divergence(self, critical: Slice) -> float:
        """Of a slice; as measured on the samples at hand where these are too few for halves."""
        own = self._own.divergence(critical)
        if not self._halves:
            return own
        other = [
            measuring.divergence(_as_large(critical, half)) for half, measuring in self._halves
        ]
        return max(own, (own + 2 * sum(other) / len(other)) / 3)


def _as_large(critical: Slice, evidence: EliminationEvidence) -> Slice:
    """The slice that keeps as many neurons of each layer, by another order."""
    kept = {}
    for name, mask in critical.kept.items():
        found = evidence.eliminations.get(name)
        if found is None:
            kept[name] = mask
            continue
        gone = found.order[: int((~mask).sum())].to(mask.device)
        kept[name] = torch.ones_like(mask).index_fill(0, gone, False)
    return Slice(kept, critical.groups)
