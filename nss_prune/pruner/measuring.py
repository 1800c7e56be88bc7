"""The divergence of the outputs that a slice really causes on the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from nss_prune.allocation.effects import LEAST_SAMPLES, MOST_SAMPLES
from nss_prune.core.batches import counted_batches, has_samples
from nss_prune.core.models import evaluation, run
from nss_prune.core.processes import processes, total_by_key
from nss_prune.graph.slices import Slice
from nss_prune.pruner.eliminating import Eliminating
from nss_prune.pruner.meaning import outputs_for
from nss_prune.pruner.plan import to_bases_of
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.strategy import Evidence
from nss_prune.pruner.subject import Subject


class Measuring:
    """Measures slices of a model on at most :data:`MOST_SAMPLES` samples of all processes.

    Args:
        subject: Its model is left as it is.
        evidence: For the repairs.
        eliminating: With the data, and what the outputs mean.
        repairs: Those after the removal are left out.
    """

    def __init__(
        self,
        subject: Subject,
        evidence: Evidence,
        eliminating: Eliminating,
        repairs: Sequence[Repair],
    ) -> None:
        self._subject = subject
        self._eliminating = eliminating
        self._bases = evidence.bases
        done = [repair for repair in repairs if getattr(repair, "before_removal", False)]
        self._repairs = [(repair, repair.observe(subject, evidence)) for repair in done]

    @property
    def possible(self) -> bool:
        """Whether the data can be read again, and has enough samples."""
        data = self._eliminating.data
        if data is None or isinstance(data, Iterator):
            return False
        return has_samples(data, LEAST_SAMPLES)

    def divergence(self, critical: Slice) -> float:
        """Of the masked and repaired model's outputs from the whole model's, nats a sample."""
        subject = self._subject
        given = self._eliminating.data
        assert given is not None  # otherwise nothing is measured
        outputs, data = outputs_for(subject, given, self._eliminating.outputs)
        smaller = replace(subject, model=copy.deepcopy(subject.model))
        critical = replace(critical, bases=())  # the copy is given those of the evidence
        to_bases_of(smaller.model, critical, self._bases)
        for repair, seen in self._repairs:
            repair.before(smaller, critical, seen)
        total, samples = 0.0, 0
        progress: Any = self._eliminating.upkeep.progress
        both = (subject.model, smaller.model)
        with (
            evaluation(both[0]), evaluation(both[1]), torch.no_grad(), critical.masked(both[1]),
        ):  # fmt: skip
            for number, inputs, count in counted_batches(both[0], data, progress, "divergence"):
                whole, left = (run(model, inputs, number, subject.forward) for model in both)
                total += float(outputs.divergence(whole, left).sum())
                samples += count
                if samples >= MOST_SAMPLES / processes():
                    break
        found = total_by_key({"nats": total, "samples": float(samples)})
        return found["nats"] / found["samples"]
