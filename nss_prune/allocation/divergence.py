"""Allocate a budget over layers by the output divergence it causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nss_prune.allocation.budget import Limits, ShareOf, solve
from nss_prune.allocation.elimination import Elimination
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice

ALLOCATIONS = 4


def allocate(
    groups: tuple[NeuronGroup, ...],
    found: Mapping[str, Elimination],
    budget: float,
    share: ShareOf,
    limits: Limits,
    rounds: int = ALLOCATIONS,
) -> tuple[Slice, float]:
    """The slice of least divergence within a budget, layers added up.

    Removing what adds least for each unit of cost, of all layers together, minimises the sum under
    the budget, whose Lagrange multiplier is the threshold. What a neuron costs depends on how many
    are left around it, so the costs are those at the last solution, and the best of some rounds is
    taken.

    Args:
        found: Layer -> its elimination; layers without one are left alone.
        budget: Share of the cost to keep, in (0, 1].
        share: The share that a slice keeps.
        rounds: After the first, neurons cost what they do at the last solution.

    Returns:
        As :func:`nss_prune.allocation.budget.solve`.
    """
    current = Slice({group.name: torch.ones(group.size).bool() for group in groups}, groups)
    found = {group.name: found[group.name] for group in groups if group.name in found}
    solutions = []
    for _ in range(rounds):
        values = scores(groups, found, costs_at(current, found, share))
        current, reached = solve(groups, values.__getitem__, budget, share, limits)
        solutions.append((reached > budget, predicted(current, found), current, reached))
    _, _, best, reached = min(solutions, key=lambda solution: solution[:2])
    return best, reached


def predicted(critical: Slice, found: Mapping[str, Elimination]) -> float:
    """Σ D of a slice that follows the eliminations, in nats a sample."""
    removed = {name: len(neurons) for name, neurons in critical.removed.items()}
    return sum(float(found[name].divergence[n - 1]) for name, n in removed.items())


def costs_at(current: Slice, found: Mapping[str, Elimination], share: ShareOf) -> dict[str, float]:
    """Layer -> what one of its neurons costs, by eliminating the next tenth of those left."""
    whole = share(current)
    costs = {}
    for name, elimination in found.items():
        kept = current.kept[name].clone()
        left = elimination.order.cpu()[kept[elimination.order.cpu()]]
        removed = left[: max(1, len(left) // 10)]
        kept[removed] = False
        without = Slice({**current.kept, name: kept}, current.groups) if kept.any() else current
        costs[name] = (whole - share(without)) / len(removed)
    return costs


def scores(
    groups: Sequence[NeuronGroup], found: Mapping[str, Elimination], costs: Mapping[str, float]
) -> dict[str, Tensor]:
    """Layer -> divergence for each unit of cost that a neuron saves, all different, ``[neurons]``.

    Args:
        costs: Layer -> what one of its neurons costs.
    """
    least = torch.finfo(torch.float64).tiny
    result = {group.name: torch.full((group.size,), torch.inf).double() for group in groups}
    for name, elimination in found.items():
        by_rank = elimination.slopes.cpu() / max(costs[name], least)
        ranks = torch.arange(len(by_rank))
        distinct = by_rank * (1 + 1e-9 * ranks) + least * ranks
        result[name][elimination.order.cpu()] = distinct
    return result
