"""Channels that go together in blocks, tried before they take the place of the traced groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nss_prune.core.models import Forward, call_model
from nss_prune.errors import RemovalError
from nss_prune.graph.axes import side_width
from nss_prune.graph.coupled import Followed, candidates, followed, reasons_to_stay
from nss_prune.graph.groups import MAKES_THE_OUTPUT, NOT_REACHED
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.surgery.execute import Pruners
from nss_prune.surgery.structure import StructureCheck
from nss_prune.surgery.trial import blamed, random_halves

# Reasons that need no better one.
TOLD = (MAKES_THE_OUTPUT, NOT_REACHED, "ignored")
Failure = Callable[[Sequence[str]], "str | None"]


def is_complete(neurons: NeuronMap) -> bool:
    """Whether nothing is left alone that following channels could find neurons in."""
    return all(why in TOLD for why in neurons.left_alone.values())


def coupled_on_trial(
    model: nn.Module,
    neurons: NeuronMap,
    example_inputs: Any,
    *,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
    forward: Forward = call_model,
    customized_pruners: Pruners | None = None,
) -> NeuronMap:
    """The map with neurons found by following channels where the traced ones are not right.

    A traced group stays where its removal on trial gives what masking gives. Otherwise, and where
    there is none, the neurons of :mod:`nss_prune.graph.coupled` that pass the same trial take its
    place. Where there are none either, because channels must stay, it is left alone for that
    reason. The model is left as found.
    """
    found = followed(model, example_inputs, forward, ignored)
    if found is None:
        return neurons
    structure = StructureCheck(model, example_inputs, forward)

    def refused(groups: Sequence[NeuronGroup]) -> dict[str, str]:
        """The groups that fail on trial, and why."""
        halves = random_halves(groups)
        others = {name: ~mask for name, mask in halves.items() if not mask.all()}

        def failure(names: Sequence[str]) -> str | None:
            try:
                for kept in (halves, others):
                    chosen = {name: mask for name, mask in kept.items() if name in names}
                    structure.check(Slice(chosen, tuple(groups)), customized_pruners)
            except RemovalError as error:
                return str(error)
            return None

        return blamed(groups, failure) if groups else {}

    result, reasons = _replaced(neurons, found, refused)
    stay = reasons_to_stay(found)
    doubted = [group for group in result.groups if stay.get(group.name, TOLD[0]) not in TOLD]
    result = result.without({name: stay[name] for name in refused(doubted)})
    result = _with_roots(model, result, {name: stay[name] for name in found.roots if name in stay})
    return _told(model, result, {**stay, **reasons})


def _with_roots(model: nn.Module, neurons: NeuronMap, reasons: dict[str, str]) -> NeuronMap:
    """The map with layers that must stay left alone, also where none were traced."""
    sizes = {name: side_width(model.get_submodule(name), "out", None) or 0 for name in reasons}
    return replace(
        neurons,
        left_alone={**reasons, **neurons.left_alone},
        left_alone_sizes={**sizes, **neurons.left_alone_sizes},
    )


def _replaced(
    neurons: NeuronMap,
    found: Followed,
    refused: Callable[[Sequence[NeuronGroup]], dict[str, str]],
) -> tuple[NeuronMap, dict[str, str]]:
    """The map with what passes, and why others do not."""
    groups, reasons = list(neurons.groups), {}
    hidden = {name for name, why in neurons.left_alone.items() if why == NOT_REACHED}
    for proposed in candidates(found):
        new = [
            group
            for group in proposed
            if not any(_same(group, old) for old in groups)
            if hidden.isdisjoint(member.name for member in group.members if member.side != "in")
        ]
        doubted = [old for old in groups if any(_overlap(old, group) for group in new)]
        wrong = refused(doubted)
        right = [old for old in doubted if old.name not in wrong]
        new = [group for group in new if not any(_overlap(group, old) for old in right)]
        failed = refused(new)
        reasons.update({name: why for name, why in failed.items() if name not in reasons})
        good = [group for group in new if group.name not in failed]
        groups = [old for old in groups if not any(_overlap(old, group) for group in good)] + good
    return replace(neurons, groups=tuple(groups)), reasons


def _told(model: nn.Module, neurons: NeuronMap, reasons: dict[str, str]) -> NeuronMap:
    """The map in the model's order, and why what is left alone is."""
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    makers = {
        member.name for group in neurons.groups for member in group.members if member.side != "in"
    }
    left_alone = {
        name: why if why in TOLD else reasons.get(name, why)
        for name, why in neurons.left_alone.items()
        if name not in makers
    }
    return replace(
        neurons,
        groups=tuple(sorted(neurons.groups, key=lambda group: order.get(group.name, 0))),
        left_alone=left_alone,
        left_alone_sizes={
            name: size for name, size in neurons.left_alone_sizes.items() if name in left_alone
        },
    )


def _places(group: NeuronGroup) -> Iterable[tuple[tuple[str, str, int | None], frozenset[int]]]:
    for member in group.members:
        yield (member.name, member.side, member.axis), frozenset(member.channels.tolist())


def _overlap(one: NeuronGroup, other: NeuronGroup) -> bool:
    """Whether two groups have a channel in common."""
    places = dict(_places(one))
    return any(not channels.isdisjoint(places.get(at, ())) for at, channels in _places(other))


def _same(one: NeuronGroup, other: NeuronGroup) -> bool:
    """Whether two groups have the same neurons on the same layers."""
    mine, its = (
        {(member.name, member.side): member for member in group.members if member.axis is None}
        for group in (one, other)
    )
    return mine.keys() == its.keys() and all(
        torch.equal(member.channels, its[side].channels)
        and torch.equal(member.neurons, its[side].neurons)
        for side, member in mine.items()
    )
