"""Which groups can be removed: each is tried before it is trusted."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import Forward, call_model
from nss_prune.errors import NothingToPruneError, RemovalError
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.execute import Pruners
from nss_prune.surgery.structure import StructureCheck


def verified(
    model: nn.Module,
    neurons: NeuronMap,
    example_inputs: Any,
    *,
    customized_pruners: Pruners | None = None,
    forward: Forward = call_model,
    adapters: Sequence[Adapter] = ADAPTERS,
    critical: Slice | None = None,
) -> NeuronMap:
    """The neurons whose removal can be trusted; the model is left as found.

    What is outside of ``critical`` is removed on trial from a copy of the model with random
    weights. If that is not what masking gives, the groups to blame are searched for, and left
    alone with the reason.

    Args:
        critical: The slice to try. By default about half of the neurons of each group, drawn at
            random and an odd number: what only works for multiples of something must not pass.

    Raises:
        NothingToPruneError: No group can be trusted.
    """
    structure = StructureCheck(model, example_inputs, forward)
    kept = random_halves(neurons.groups) if critical is None else critical.kept

    def failure(names: Sequence[str]) -> str | None:
        """Why these groups cannot shrink together, or None."""
        chosen = {name: mask for name, mask in kept.items() if name in names}
        try:
            structure.check(Slice(chosen, neurons.groups), customized_pruners, adapters)
        except RemovalError as error:
            return str(error)
        return None

    refused = blamed(neurons.groups, failure)
    if len(refused) < len(neurons.groups):
        return neurons.without(refused)
    all_reasons = {**neurons.left_alone, **refused}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in all_reasons.items())
    raise NothingToPruneError(f"no layer is left to prune on trial: {reasons}")


def random_halves(groups: Sequence[NeuronGroup]) -> dict[str, Tensor]:
    """Layer -> True for the neurons that stay on trial, an odd number."""
    generator = torch.Generator().manual_seed(0)
    halves = {}
    for group in groups:
        kept = torch.zeros(group.size, dtype=torch.bool)
        count = group.size // 2 | 1
        kept[torch.randperm(group.size, generator=generator)[:count]] = True
        halves[group.name] = kept
    return halves


def blamed(
    groups: Sequence[NeuronGroup], failure: Callable[[Sequence[str]], str | None]
) -> dict[str, str]:
    """The groups that fail by themselves, or only with others that do not, and why.

    Halves are tried, then quarters, and so on. Groups at the same place of repeated blocks stay
    together, and where the first of them fails alone, all are taken to: with a dozen blocks of
    attention, trying each would take a dozen times as long.
    """
    good: list[str] = []
    found: dict[str, str] = {}

    def sort_out(alike: Sequence[Sequence[str]]) -> None:
        reason = failure([*good, *itertools.chain(*alike)])
        if reason is None:
            good.extend(itertools.chain(*alike))
        elif len(alike) > 1:
            middle = len(alike) // 2
            sort_out(alike[:middle])
            sort_out(alike[middle:])
        elif len(alike[0]) > 1 and failure([*good, alike[0][0]]) is None:
            sort_out([[name] for name in alike[0]])
        else:
            found.update(dict.fromkeys(alike[0], reason))

    by_place: dict[Any, list[str]] = {}
    for group in groups:
        sides = tuple(sorted(member.side for member in group.members))
        by_place.setdefault((re.sub(r"\d+", "#", group.name), sides), []).append(group.name)
    sort_out(list(by_place.values()))
    return found
