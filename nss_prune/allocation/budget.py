"""Budgets and limits: which slice keeps a given share of the cost, by a ranking of the neurons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import call_model, submodule
from nss_prune.graph.costs import ParameterCount, macs_by_module, projections
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.graph.slices import Slice

TOLERANCE = 0.01
"""A budget counts as met within this share of the whole model's cost."""

FLOOR = 0.1
"""Share of its neurons that a layer keeps at least where a budget cannot be met anyway."""


ShareOf = Callable[[Slice], float]


Scores = Callable[[str], Tensor]
"""Layer -> importance of its neurons, ``[neurons]``."""


@dataclass(frozen=True)
class Limits:
    """What a slice must keep, whatever else asks for less.

    Attributes:
        least: Layer -> neurons that stay at least; 1 where it is not named.
        round_to: Neurons are kept in multiples of this; layers with fewer keep all.
        unrounded: Layers whose neurons are heads, and not single channels.
        floor: Layer -> neurons that stay at least where a budget is out of reach.
    """

    least: Mapping[str, int] = field(default_factory=dict)
    round_to: int = 1
    unrounded: frozenset[str] = frozenset()
    floor: Mapping[str, int] = field(default_factory=dict)

    def kept(self, layer: str, size: int, wanted: int) -> int:
        """How many of ``size`` neurons to keep where ``wanted`` would do."""
        least = max(1, wanted, self.least.get(layer, 1))
        step = 1 if layer in self.unrounded else self.round_to
        return min(size, -(-least // step) * step)

    def out_of_reach(self) -> Limits:
        """Where a budget cannot be met: no layer is ruined for what is missing all the same."""
        names = {*self.least, *self.floor}
        least = {name: max(self.least.get(name, 1), self.floor.get(name, 1)) for name in names}
        return replace(self, least=least)


def limited(critical: Slice, limits: Limits, scores: Scores) -> Slice:
    """A slice and, where the limits or a consumer ask for more, the best of the neurons outside."""
    kept = {}
    for name, mask in critical.kept.items():
        count = limits.kept(name, len(mask), int(mask.sum()))
        kept[name] = mask if count == int(mask.sum()) else _best(mask, scores(name), count)
    return _readable(Slice(kept, critical.groups), scores, _partial_members(critical.groups))


def _partial_members(groups: Sequence[NeuronGroup]) -> list[tuple[str, Member]]:
    """Group and member, for the members that see only a part of the neurons of their group."""
    return [
        (group.name, member)
        for group in groups
        for member in group.members
        if len(member.neurons) < group.size or len(member.neurons.unique()) < group.size
    ]


def _readable(critical: Slice, scores: Scores, partial: Sequence[tuple[str, Member]]) -> Slice:
    """A slice that leaves every member of a group a neuron."""
    kept = dict(critical.kept)
    for name, member in partial:
        if name in kept and not kept[name][member.neurons].any():
            best = member.neurons[scores(name)[member.neurons].argmax()]
            kept[name] = kept[name].index_fill(0, best, True)
    return Slice(kept, critical.groups)


def _best(first: Tensor, scores: Tensor, count: int) -> Tensor:
    """True for ``count`` neurons: those of ``first``, then by score."""
    order = scores.argsort(descending=True, stable=True)
    order = order[first[order].long().argsort(descending=True, stable=True)]
    return torch.zeros_like(first).index_fill(0, order[:count], True)


def parameter_share(groups: Sequence[NeuronGroup], model: nn.Module, whole: int) -> ShareOf:
    """The parameters that a slice of some groups keeps, as a share of ``whole``."""
    count = ParameterCount(groups, model)
    return lambda critical: sum(count.left(critical.kept).values()) / whole


def mac_share(
    groups: Sequence[NeuronGroup],
    model: nn.Module,
    whole: int,
    example_inputs: Any,
    forward: Any = call_model,
) -> ShareOf:
    """The multiply-accumulates of one call that a slice keeps, as a share of ``whole``.

    Those of a layer shrink as its weight does, the products of attention with its heads, and
    what else has no weight stays as it is.
    """
    by_module = macs_by_module(model, example_inputs, forward)
    count = ParameterCount(groups, model)
    sizes = {name: math.prod(shape) for name, shape in count.shapes.items()}
    first = count.first_names
    weights = {name: _weights(name, submodule(model, name), first) for name in by_module}
    counted = [
        (by_module[name], names, sum(sizes[each] for each in names))
        for name, names in weights.items()
        if names
    ]
    products = _products(groups, model, by_module)
    for name, multiplied in projections(model, example_inputs, forward).items():
        for weight, macs in multiplied.items():
            counted.append((macs, [first[weight]], sizes[first[weight]]))
        if name in products:
            macs, heads = products[name]
            products[name] = macs - sum(multiplied.values()), heads

    def share(critical: Slice) -> float:
        left = count.left(critical.kept)
        gone = sum(
            macs * (1 - sum(left[name] for name in names) / size) for macs, names, size in counted
        )
        for macs, names in products.values():
            gone += macs * (1 - math.prod(_share(critical.kept[name]) for name in names))
        return (by_module[""] - gone) / whole

    return share


def _weights(name: str, module: nn.Module, first_names: Mapping[str, str]) -> list[str]:
    """What a layer multiplies its inputs by: a weight, in a recurrent one those of all gates.

    A weight that several layers share has the name that it has in the first one.
    """
    keys = [key for key in module._parameters if key.startswith("weight_")]
    wanted = keys if isinstance(module, nn.RNNBase) else ["weight"]
    names = [f"{name}.{key}".lstrip(".") for key in wanted]
    return [first_names[full] for full in names if full in first_names]


def _products(
    groups: Sequence[NeuronGroup], model: nn.Module, by_module: Mapping[str, int]
) -> dict[str, tuple[int, list[str]]]:
    """Module -> multiply-accumulates of its products, and the groups they shrink with."""
    found: dict[str, tuple[int, list[str]]] = {}
    for group in groups:
        if group.has_channels:
            continue
        name = group.name if group.is_inside_heads else group.name.rpartition(".")[0]
        found.setdefault(name, (_own_macs(model, name, by_module), []))[1].append(group.name)
    return found


def _share(kept: Tensor) -> float:
    return int(kept.sum()) / len(kept)


def _own_macs(model: nn.Module, name: str, by_module: Mapping[str, int]) -> int:
    """What a module computes besides its children."""
    children = (
        f"{name}.{child}".lstrip(".") for child, _ in submodule(model, name).named_children()
    )
    return by_module.get(name, 0) - sum(by_module.get(child, 0) for child in children)


def solve(
    groups: tuple[NeuronGroup, ...],
    scores: Scores,
    budget: float,
    share: ShareOf,
    limits: Limits,
    *,
    fill: bool = True,
) -> tuple[Slice, float]:
    """The slice that keeps the best neurons of all layers together within a budget.

    With the scores of semantic slicing this is a search for θ, neuron by neuron: the entry
    thresholds are its steps, and their ties are broken by the contribution.

    Args:
        budget: Share of the cost to keep, in (0, 1].
        share: The share that a slice keeps.
        fill: Where the slice is short of the budget, fill it up with single neurons that fit
            besides, whatever their layers keep.

    Returns:
        The slice, and the share that it keeps: the largest within the budget. Where not even the
        least that the limits allow is within it, the floors hold as well.
    """
    ranked = Ranked(groups, scores, limits)
    without = ranked.without
    fewest, most = 0, len(ranked.owners)
    if share(without(most)) > budget:
        ranked.limits = limits.out_of_reach()
        critical = without(most)
        return critical, share(critical)
    while fewest < most:
        middle = (fewest + most) // 2
        if share(without(middle)) <= budget:
            most = middle
        else:
            fewest = middle + 1
    critical = without(fewest)
    if fill and budget - share(critical) > TOLERANCE:
        gone = torch.bincount(ranked.owners[:fewest], minlength=len(groups))
        critical = _filled(ranked, gone, budget, share)
    return critical, share(critical)


class Ranked:
    """All neurons in one order, the worst first, and the slices that follow it in each layer."""

    def __init__(self, groups: tuple[NeuronGroup, ...], scores: Scores, limits: Limits) -> None:
        self.groups = groups
        self.limits = limits
        self.by_layer = {group.name: scores(group.name) for group in groups}
        owners = torch.cat([torch.full((group.size,), i) for i, group in enumerate(groups)])
        self.owners = owners[torch.cat(list(self.by_layer.values())).argsort(stable=True)]
        self._rankings = {
            name: values.argsort(descending=True, stable=True)
            for name, values in self.by_layer.items()
        }
        self._partial = _partial_members(groups)

    def slice(self, gone: Tensor) -> Slice:
        """The slice without so many neurons of each group, ``[groups]``, but within the limits."""
        kept = {}
        for group, removed in zip(self.groups, gone.tolist(), strict=True):
            stay = self.limits.kept(group.name, group.size, group.size - removed)
            best = self._rankings[group.name][:stay]
            kept[group.name] = torch.zeros(group.size, dtype=torch.bool).index_fill(0, best, True)
        return _readable(Slice(kept, self.groups), self.by_layer.__getitem__, self._partial)

    def without(self, count: int) -> Slice:
        """The slice without the worst ``count`` neurons, but within the limits."""
        return self.slice(torch.bincount(self.owners[:count], minlength=len(self.groups)))

    def gone_after(self, counts: Tensor) -> dict[str, Tensor]:
        """Layer -> its neurons among the worst ones, within the limits, ``[counts]``."""
        found = {}
        for index, group in enumerate(self.groups):
            mine = (self.owners == index).long().cumsum(0)
            among = nn.functional.pad(mine, (1, 0))[counts]
            stay = (self.limits.kept(group.name, group.size, n) for n in range(group.size, -1, -1))
            found[group.name] = group.size - torch.tensor(list(stay))[among]
        return found

    def best_gone(self, gone: Tensor) -> list[int]:
        """Groups that lose neurons, those whose best lost neuron scores most first."""
        losing = gone.nonzero().flatten().tolist()

        def score(index: int) -> float:
            group = self.groups[index]
            best = self._rankings[group.name][group.size - int(gone[index])]
            return float(self.by_layer[group.name][best])

        return sorted(losing, key=score, reverse=True)


def _filled(ranked: Ranked, gone: Tensor, budget: float, share: ShareOf) -> Slice:
    """A slice with the neurons put back that a budget has room for besides.

    Where the last neuron that went is a large share of the cost, smaller ones went before it.
    """
    for index in ranked.best_gone(gone):
        fewest, most = 0, int(gone[index])
        while fewest < most:
            gone[index] = (fewest + most) // 2
            if share(ranked.slice(gone)) <= budget:
                most = int(gone[index])
            else:
                fewest = int(gone[index]) + 1
        gone[index] = fewest
    return ranked.slice(gone)
