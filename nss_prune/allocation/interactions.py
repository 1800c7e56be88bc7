"""What layers do to the outputs together: the cross terms of the predicted divergence.

When neurons of several layers go, the loss of a sample moves by Σ_l e_l, and the divergence of the
outputs is ½ E[(Σ_l e_l)²] = Σ_l D_l + Σ_{l<m} E[e_l e_m]. The pass that measures D_l
(:mod:`nss_prune.allocation.effects`) has e of all layers at hand for the same samples; their
products are averaged there. Between the measured numbers of neurons e is interpolated linearly,
and then enlarged to the D_l of its layer, which also holds what is predicted beyond the
measurement: the correlations are those measured, and the prediction is never below 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nss_prune.allocation.elimination import Elimination
from nss_prune.graph.slices import Slice

BATCH = 4096  # slices that are predicted at a time


@dataclass(frozen=True)
class Products:
    """E[e_a e_b] of all levels that were measured in one pass.

    Attributes:
        layers: In their order.
        levels: How many each layer has.
        counts: Neurons gone at each level, ``[levels]``.
        products: Float64 ``[levels, levels]``.
    """

    layers: tuple[str, ...]
    levels: tuple[int, ...]
    counts: Tensor
    products: Tensor


class Interactions:
    """E[e_a e_b] of all levels that were measured in the same pass.

    Attributes:
        parts: Of each pass: layer -> neurons gone at its levels, ``[levels of the layer]``, and the
            averages, float64 ``[levels, levels]`` with the layers in this order.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[dict[str, Tensor], Tensor]] = []

    def add(self, counts: Mapping[str, Tensor], products: Tensor) -> None:
        """Add those of a pass; products of layers of different passes count as 0."""
        self.parts.append((dict(counts), products))

    def records(self) -> dict[str, Products]:
        """Number of the pass -> what it measured, to keep in a file."""
        return {
            str(number): Products(
                tuple(counts),
                tuple(len(own) for own in counts.values()),
                torch.cat(list(counts.values())),
                products,
            )
            for number, (counts, products) in enumerate(self.parts)
        }

    @staticmethod
    def of(records: Mapping[str, Products]) -> Interactions:
        """What :meth:`records` gave."""
        made = Interactions()
        for record in records.values():
            counts = record.counts.split(list(record.levels))
            made.add(dict(zip(record.layers, counts, strict=True)), record.products)
        return made


class Predictor:
    """The predicted divergence of slices that follow the eliminations, cross terms included.

    Args:
        found: Layer -> its elimination.
        interactions: None or without parts for Σ_l D_l alone.
    """

    def __init__(
        self, found: Mapping[str, Elimination], interactions: Interactions | None = None
    ) -> None:
        parts = [] if interactions is None else interactions.parts
        self.has_cross_terms = bool(parts)
        self._alone = {  # D_l after no neuron, one, ..., all; 0 where the products have it
            name: torch.cat([torch.zeros(1).double(), elimination.divergence.cpu().double()])
            for name, elimination in found.items()
        }
        self._parts: list[tuple[dict[str, Tensor], Tensor]] = []
        for counts, products in parts:
            positions = torch.arange(len(products)).split([len(own) for own in counts.values()])
            weights = {}
            for (name, own), at in zip(counts.items(), positions, strict=True):
                weights[name] = _weights(found[name], own)
                within = products[at][:, at]
                square = ((weights[name] @ within) * weights[name]).sum(1) / 2
                factor = (self._alone[name] / square).where(square > 0, torch.zeros(1).double())
                weights[name] *= factor.sqrt()[:, None]
                self._alone[name] = self._alone[name].where(square <= 0, torch.zeros(1).double())
            self._parts.append((weights, products))

    def divergence(self, gone: Mapping[str, Tensor]) -> Tensor:
        """In nats a sample, float64 ``[slices]``.

        Args:
            gone: Layer -> neurons that each slice lacks, ``[slices]``.
        """
        slices = len(next(iter(gone.values())))
        total = torch.zeros(slices, dtype=torch.float64)
        for name, count in gone.items():
            if name in self._alone:
                total += self._alone[name][count]
        for weights, products in self._parts:
            for first in range(0, slices, BATCH):
                chosen = slice(first, first + BATCH)
                absent = torch.zeros(len(total[chosen]), dtype=torch.long)
                rows = [
                    table[gone[name][chosen] if name in gone else absent]
                    for name, table in weights.items()
                ]
                levels = torch.cat(rows, 1)
                total[chosen] += ((levels @ products) * levels).sum(1) / 2
        return total

    def of(self, critical: Slice) -> float:
        """Of one slice."""
        gone = {name: torch.tensor([int((~kept).sum())]) for name, kept in critical.kept.items()}
        return float(self.divergence(gone)) if gone else 0.0

    def table(self, layer: str) -> Tensor:
        """Of one layer alone, after no neuron, one, ..., all: ``[neurons + 1]``."""
        return self.divergence({layer: torch.arange(len(self._alone[layer]))})

    @property
    def layers(self) -> tuple[str, ...]:
        """Those with an elimination."""
        return tuple(self._alone)


def _weights(found: Elimination, counts: Tensor) -> Tensor:
    """How e after any number of neurons mixes those measured, ``[neurons + 1, levels]``."""
    numbers = np.arange(len(found.order) + 1)
    knots = [0, *counts.tolist()]
    units = np.eye(len(knots))[1:]
    return torch.tensor(np.stack([np.interp(numbers, knots, unit) for unit in units], 1))
