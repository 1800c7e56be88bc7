"""How the consumers and norms of a group change when its first neurons go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nss_prune.allocation.changes import (
    ConsumerChange,
    NormChange,
    norm_change,
    ordered,
)
from nss_prune.allocation.elimination import shrunk
from nss_prune.allocation.explained import Explained, by_covariance, by_precision
from nss_prune.compensation.eligible import reason_to_leave, shared_weights
from nss_prune.core.models import submodule
from nss_prune.graph.axes import map_positions, sides_by_consumer
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.graph.norms import norm_of
from nss_prune.statistics.moments import ConsumerStatistics

Changes = tuple[dict[str, ConsumerChange], dict[str, NormChange], dict[str, ConsumerChange]]
"""Consumers, norms and makers of queries by name, and how they change."""


class GroupChanges:
    """How consumers and norms change when the neurons of one group go.

    Args:
        groups: All groups of the model.
        statistics: Of the consumers' inputs; None where nothing is folded.
        most_values: Of inverse covariances that are kept for consumers of several groups.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[NeuronGroup],
        statistics: Mapping[str, ConsumerStatistics] | None,
        most_values: int,
    ) -> None:
        self._model = model
        self._sides = sides_by_consumer(groups)
        self._statistics = statistics or {}
        self._most_values = most_values
        self._shared = shared_weights(model)
        self._precisions: dict[str, Tensor] = {}

    def of(self, group: NeuronGroup, order: Tensor, counts: Sequence[int]) -> Changes:
        """Of one group.

        Args:
            order: Neurons, the first to go first, ``[neurons]``.
            counts: Neurons that have gone at each level.
        """
        ranks = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
        consumers, norms = {}, {}
        for member in group.members:
            when = torch.full((member.width,), -1)
            when[member.channels] = ranks[member.neurons]
            if member.side == "in" and member.axis is None:
                module = submodule(self._model, member.name)
                consumers[member.name] = self._consumer(member, module, when, counts)
            elif norm := norm_of(member, self._model):
                kept = torch.stack([(when < 0) | (when >= count) for count in counts])
                name = member.name if member.axis is None else member.name.rpartition(".")[0]
                norms[name] = norm_change(norm, kept)
        return consumers, norms, self._queries(group, ranks, counts)

    def _queries(
        self, group: NeuronGroup, ranks: Tensor, counts: Sequence[int]
    ) -> dict[str, ConsumerChange]:
        """Queries lose dimensions, and nothing makes up for them."""
        if (queries := group.queries) is None:
            return {}
        when = torch.full((queries.width,), -1)
        when[queries.channels] = ranks[queries.neurons]
        return {queries.name: ConsumerChange(*ordered(when, counts))}

    def _consumer(
        self, member: Member, module: nn.Module, ranks: Tensor, counts: Sequence[int]
    ) -> ConsumerChange:
        found = self._statistics.get(member.name)
        if found is None or reason_to_leave(module, found, self._shared):
            return ConsumerChange(*ordered(ranks, counts))
        repeats = map_positions(module, self._sides[member.name])
        if found.observations < 2 * member.width:
            found = found.by_neuron(repeats)
        units = len(found.covariance)
        order, gone = ordered(ranks.view(units, -1)[:, 0], counts)
        explained = self._explained(member.name, module, found, order, gone) if max(gone) else None
        return ConsumerChange(order, gone, found.mean, explained)

    def _explained(
        self,
        name: str,
        module: nn.Module,
        found: ConsumerStatistics,
        order: Tensor,
        gone: Sequence[int],
    ) -> Explained:
        """By the covariance of an input, without that between channel groups."""
        home = found.covariance.device
        order = order.to(home)
        if name in self._precisions:
            return by_precision(self._precisions[name], order, gone)
        covariance, groups = found.covariance, getattr(module, "groups", 1)
        if groups > 1:
            block = torch.arange(len(covariance), device=home) * groups // len(covariance)
            covariance = covariance * (block[:, None] == block)
        if len(self._sides[name]) == 1:
            rows = found.rows * groups
            return by_covariance(covariance, found.observations, rows, order, gone)
        factor = torch.linalg.cholesky(shrunk(covariance, found.observations))
        self._keep(name, precision := torch.cholesky_inverse(factor))
        return by_precision(precision, order, gone)

    def _keep(self, name: str, precision: Tensor) -> None:
        """Keep one for the next group of its consumer, the latest ones where there are many."""
        self._precisions[name] = precision
        while sum(known.numel() for known in self._precisions.values()) > self._most_values:
            self._precisions.pop(next(iter(self._precisions)))
