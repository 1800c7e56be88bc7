"""Dimensions inside the heads of a model, each attention module tried before it is trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import Forward, call_model, clone, evaluation, full_precision
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.core.text import first_line
from nss_prune.discovery.calls import Call, look, recorded_calls
from nss_prune.errors import RemovalError
from nss_prune.graph.bases import change_basis
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.structures.attention import find_heads
from nss_prune.structures.dimensions import HEAD_DIMENSIONS, find_dimensions
from nss_prune.structures.head_coordinates import basis_changes
from nss_prune.surgery.structure import StructureCheck

ALONE = "it computes something else with fewer dimensions in each head"
MIXED = "it computes something else in other coordinates of its heads"
EXACT = 1e-8  # largest difference allowed in float64, as a share of the largest value


def with_head_dimensions(
    model: nn.Module, neurons: NeuronMap, example_inputs: Any, forward: Forward = call_model
) -> NeuronMap:
    """The map with the dimensions of all heads that may go; the model is left as found.

    Modules that look the same are tried once. Those that do not stand the trial are left alone
    with the reason, under the name of the attention module.

    Args:
        neurons: With the heads; where these are left alone, so are their dimensions.
    """
    heads = {group.name: group for group in neurons.groups if not group.has_channels}
    attending = [module for name, module in model.named_modules() if name and _root(name, module)]
    calls = recorded_calls(model, attending, example_inputs, forward) if heads else {}
    verdicts: dict[Any, str | None] = {}
    found: list[NeuronGroup] = []
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        group = heads.get(_root(name, module) or "") if name else None
        if group is None:
            continue
        seen = look(module, calls.get(module))
        if seen not in verdicts:
            verdicts[seen] = refusal(module, calls.get(module))
        if (reason := verdicts[seen]) is None:
            found += [_like(own, group) for own in HEAD_DIMENSIONS.groups(name, module)]
        else:
            reasons[name] = reason
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    groups = sorted([*neurons.groups, *found], key=lambda group: order[group.name])
    alike = {
        why: [name for name, other in reasons.items() if other == why] for why in reasons.values()
    }
    notes = [
        f"the heads of {', '.join(names)} keep their dimensions: {why}"
        for why, names in alike.items()
    ]
    return replace(neurons, groups=tuple(groups), notes=(*neurons.notes, *notes))


def refusal(module: nn.Module, call: Call | None) -> str | None:
    """Why the dimensions of an attention module's heads must stay, or None.

    Args:
        call: What the module is called with; None where it is not.
    """
    found = find_dimensions(module)
    if isinstance(found, str):
        return found
    if call is None:
        return "it is not called"
    try:
        if not _turns(module, call):
            return MIXED
        groups = HEAD_DIMENSIONS.groups("", module)
        halves = {group.name: torch.arange(group.size) % 2 == 0 for group in groups}
        structure = StructureCheck(
            module,
            (call.arguments, call.keywords),
            lambda part, inputs: Call(*inputs).on(part),
        )
        structure.check(Slice(halves, groups), adapters=())
    except RemovalError:
        return ALONE
    except Exception as error:
        return f"it cannot be tried alone: {first_line(error)}"
    return None


@full_precision()
def _turns(module: nn.Module, call: Call) -> bool:
    """Whether other coordinates of the heads change nothing."""
    copy, turned = clone(module, _exact), clone(module, _exact)
    exact = Call(map_tensors(_exact, call.arguments), map_tensors(_exact, call.keywords))
    found = find_dimensions(turned)
    assert not isinstance(found, str)
    generator = torch.Generator().manual_seed(0)
    shape = (len(found.queries.channels), found.width, found.width)
    products, values = (torch.randn(shape, generator=generator).double() for _ in range(2))
    change_basis(turned, basis_changes("", found, products, values))
    with evaluation(copy), evaluation(turned), torch.no_grad():
        wanted, given = (tensors_in(exact.on(part)) for part in (copy, turned))
    return all(
        bool((one - other).abs().max() <= EXACT * one.abs().max())
        for one, other in zip(wanted, given, strict=True)
    )


def _exact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _root(name: str, module: nn.Module) -> str | None:
    """The name that the group of a module's heads has."""
    heads = find_heads(module)
    return None if heads is None else f"{name}.{heads.going[0].projection.name}"


def _like(group: NeuronGroup, heads: NeuronGroup) -> NeuronGroup:
    """A group whose consumer and queries have their samples where those of the heads do."""
    axes: Mapping[str, int] = {member.name: member.sample_axis for member in heads.consumers}
    axis = next(iter(axes.values()))
    assert group.queries is not None
    return replace(
        group,
        members=tuple(
            replace(member, sample_axis=axis) if member.side == "in" else member
            for member in group.members
        ),
        queries=replace(group.queries, sample_axis=axis),
    )
