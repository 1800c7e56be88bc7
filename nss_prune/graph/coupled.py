"""Channels that go together, found by following them through a call: blocks, halves, shuffles.

torch-pruning maps the channels of one layer to those of the next by their order. Where tensors are
cut, shuffled or reshaped in between, their labels tell what goes together
(:mod:`nss_prune.graph.labels`). A division of an axis adds what labels cannot tell: of
``[4, 8]`` channels either whole columns or whole rows can go, depending on which of the two numbers
the model takes from the width. Both are candidates.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.models import Forward, call_model, evaluation, meta_copy, without_values
from nss_prune.core.nested import map_tensors, tensors_in
from nss_prune.graph.groups import MAKES_THE_OUTPUT
from nss_prune.graph.labels import Labels
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.graph.sides import CROSSES_ATTENTION, SEPARATE, AnyLayer, LabelledSide, layers_of

Mode = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
"""Context in which a model is in evaluation or in training mode."""

ROOTS = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase)


@dataclass(frozen=True)
class Followed:
    """What following a call has shown.

    Attributes:
        labels: Their joints, pins and grids.
        sides: Of layers and of bare parameters.
        roots: Names of layers that neurons may be named after, in the model's order.
    """

    labels: Labels
    sides: tuple[LabelledSide, ...]
    roots: tuple[str, ...]

    @functools.cached_property
    def component(self) -> Tensor:
        """The smallest label that each label goes together with, ``[labels]``."""
        return components(self.labels.count, self.labels.edges)


def followed(
    model: nn.Module,
    example_inputs: Any,
    forward: Forward = call_model,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
) -> Followed | None:
    """Follow the channels through one call; None where the model does not run like this.

    The model is left as found. Where it can, a copy without values is called, which computes
    nothing.
    """
    stay = _ignored_names(model, ignored)
    with contextlib.suppress(Exception):
        inputs = map_tensors(without_values, example_inputs)
        return _followed(meta_copy(model), inputs, forward, stay)
    with contextlib.suppress(Exception):
        return _followed(model, example_inputs, forward, stay)
    return None


def candidates(found: Followed) -> list[tuple[NeuronGroup, ...]]:
    """Neurons by either reading of the divided axes, the last axis free first; often the same."""
    first = _reading(found, free=-1)
    if not found.labels.grids:
        return [_groups(found, *first)]
    second = _reading(found, free=0)
    same = all(torch.equal(mine, its) for mine, its in zip(first, second, strict=True))
    return [_groups(found, *reading) for reading in ([first] if same else [first, second])]


def _ignored_names(model: nn.Module, ignored: Sequence[nn.Module | nn.Parameter]) -> set[str]:
    inside = {part for layer in ignored if isinstance(layer, nn.Module) for part in layer.modules()}
    parameters = {id(layer) for layer in ignored if isinstance(layer, nn.Parameter)}
    return {name for name, module in model.named_modules() if module in inside} | {
        name for name, value in model.named_parameters() if id(value) in parameters
    }


def labelled_call(
    model: nn.Module, inputs: Any, forward: Forward, labels: Labels, mode: Mode = evaluation
) -> tuple[list[AnyLayer], Any]:
    """The layers of a model, and its outputs, with labels of all channels of one call.

    Args:
        mode: In which the model is called.
    """
    layers = list(layers_of(model, labels))
    with contextlib.ExitStack() as stack:
        for layer in layers:
            for handle in layer.attach():
                stack.callback(handle.remove)
        stack.enter_context(mode(model))
        stack.enter_context(torch.no_grad())
        fast_path = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(labels)
        return layers, forward(model, inputs)


def _followed(model: nn.Module, inputs: Any, forward: Forward, stay: set[str]) -> Followed:
    labels = Labels()
    layers, outputs = labelled_call(model, inputs, forward, labels)
    for tensor in tensors_in(outputs):
        labels.pin(labels.of(tensor), MAKES_THE_OUTPUT)
    sides = [side for layer in layers for side in layer.sides]
    for layer in layers:
        if any(id(value) in labels.parameters for value in layer.module.parameters()):
            for side in layer.sides:
                labels.pin(side.labels, f"parameters of {layer.name} are used outside of it")
    sides += _parameter_sides(model, labels, {side.name for side in sides})
    for side in sides:
        if side.name in stay and side.side != "in":
            labels.pin(side.labels, "ignored")
    roots = [layer.name for layer in layers if isinstance(layer.module, ROOTS)]
    return Followed(labels, tuple(sides), tuple(roots))


def _parameter_sides(model: nn.Module, labels: Labels, known: set[str]) -> Iterator[LabelledSide]:
    """The axis of each bare parameter along which its elements go with channels."""
    if not labels.parameters:
        return
    component = components(labels.count, labels.edges)
    sizes = torch.bincount(component, minlength=labels.count)
    names = {id(value): name for name, value in model.named_parameters()}
    for number, (_, elements) in labels.parameters.items():
        if number not in names or names[number] in known:
            continue
        found = component[elements]
        axes = [axis for axis in range(found.dim()) if constant_but(found, axis)]
        if len(axes) == 1:
            lines = elements.movedim(axes[0], 0).reshape(elements.shape[axes[0]], -1)
            labels.join(lines, lines[:, :1].expand_as(lines))
            line = lines[:, 0]
            yield LabelledSide(names[number], "out", axes[0], line)
        elif bool((sizes[found] > 1).any()):
            labels.pin(elements, f"{names[number]} has no axis of channels")


def constant_but(found: Tensor, axis: int) -> bool:
    """Whether components change along an axis, and along no other."""
    lines = found.movedim(axis, 0).reshape(found.shape[axis], -1)
    return (
        found.shape[axis] > 1
        and bool((lines == lines[:, :1]).all())
        and bool((lines[:, 0] != lines[0, 0]).any())
    )


def components(count: int, edges: Sequence[Tensor]) -> Tensor:
    """The smallest label that each label is connected to, ``[labels]``."""
    parent = torch.arange(count)
    if not edges:
        return parent
    one, other = torch.cat(list(edges), dim=1)
    while True:
        least = torch.minimum(parent[one], parent[other])
        joined = parent.clone()
        for ends in (one, other):
            joined.scatter_reduce_(0, parent[ends], least, "amin")
        while not torch.equal(joined, joined[joined]):
            joined = joined[joined]
        if torch.equal(joined, parent):
            return parent
        parent = joined


def _reading(found: Followed, free: int) -> tuple[Tensor, Tensor]:
    """The neuron and the group of each label, ``[labels]`` each; 0 where channels must stay."""
    labels, component = found.labels, found.component
    ties = [component[_tied(grid, component, free)] for grid in labels.grids]
    if any(tie.numel() for tie in ties):
        component = components(labels.count, ties)[component]
    together = [
        torch.stack([component[side.labels], component[side.labels[:1]].expand(len(side.labels))])
        for side in _makers(found)
    ]
    cluster = components(labels.count, together)[component]
    stays = torch.zeros(labels.count, dtype=torch.bool)
    for pinned, _ in labels.pinned:
        stays[cluster[pinned]] = True
    goes = ~stays[cluster]
    return component * goes, cluster * goes


def _makers(found: Followed) -> list[LabelledSide]:
    return [side for side in found.sides if side.side == "out" and side.axis is None]


def _groups(found: Followed, component: Tensor, cluster: Tensor) -> tuple[NeuronGroup, ...]:
    """Those of a reading."""
    makes = _makers(found)
    roots = {side.name: side for side in makes if side.name in found.roots}
    by_cluster: dict[int, list[LabelledSide]] = {}
    for side in found.sides:
        for number in cluster[side.labels].unique().tolist():
            by_cluster.setdefault(number, []).append(side)
    made: dict[int, NeuronGroup] = {}
    for name in (root for root in found.roots if root in roots):
        number = int(cluster[roots[name].labels[0]])
        if number and number not in made:
            group = _group(name, by_cluster[number], component, cluster == number)
            if group is not None:
                made[number] = group
    return tuple(made.values())


def _tied(grid: Tensor, component: Tensor, free: int) -> Tensor:
    """Pairs of labels that go together so that a divided axis stays whole, ``[2, pairs]``."""
    found = component[grid]
    if any(constant_but(found, axis) for axis in range(grid.dim())):
        return torch.empty(2, 0, dtype=torch.long)
    lines = grid.movedim(free, 0).flatten(1)
    return torch.stack([lines.flatten(), lines[:, :1].expand_as(lines).flatten()])


def _group(
    root: str, sides: Sequence[LabelledSide], component: Tensor, inside: Tensor
) -> NeuronGroup | None:
    """The neurons of one cluster of labels, named after a layer; None where they are no neurons.

    Args:
        sides: Those with labels of the cluster.
        inside: Whether a label is one of the cluster.
    """
    own = next(side for side in sides if side.name == root and side.side == "out")
    order = component[own.labels]
    numbers, which, counts = order.unique(return_inverse=True, return_counts=True)
    size, repeats = len(numbers), int(counts[0])
    if size < 2 or bool((counts != repeats).any()):
        return None
    firsts = torch.full((size,), len(order))
    firsts.scatter_reduce_(0, which, torch.arange(len(order)), "amin")
    numbers = numbers[firsts.argsort()]
    neuron = torch.full((len(component),), -1)
    neuron[numbers] = torch.arange(size)
    members = []
    for side in sides:
        its = neuron[component[side.labels]]
        channels = (inside[side.labels] & (its >= 0)).nonzero().flatten()
        if bool((inside[side.labels] & (its < 0)).any()):
            return None  # channels of it that the root does not make
        if len(channels):
            width = len(side.labels)
            neurons = its[channels]
            ordered = (neurons * width + channels).argsort()
            members.append(
                Member(side.name, side.side, channels[ordered], neurons[ordered], width, side.axis)
            )
    if not any(member.side == "in" and member.axis is None for member in members):
        return None
    plain = torch.equal(neuron[order], torch.arange(len(order)) % size)
    return NeuronGroup(root, size, tuple(members), repeats if plain else 1, followed=True)


def reasons_to_stay(found: Followed) -> dict[str, str]:
    """Layer -> why its channels must stay, where they must."""
    labels, component = found.labels, found.component
    reasons: dict[int, str] = {}
    for pinned, reason in labels.pinned:
        for number in component[pinned].unique().tolist():
            reasons.setdefault(number, reason)
    told = {}
    for side in found.sides:
        if side.side == "out" and side.axis is None:
            numbers = component[side.labels].unique().tolist()
            its = [reasons[number] for number in numbers if number in reasons]
            if its:
                told[side.name] = its[0]
            elif _is_for_attention_alone(found.sides, component, numbers):
                told[side.name] = CROSSES_ATTENTION
    return told


def _is_for_attention_alone(
    sides: Sequence[LabelledSide], component: Tensor, numbers: Sequence[int]
) -> bool:
    """Whether columns of attention consume some components, and no layer does."""
    its = torch.tensor(numbers)
    read = [
        side
        for side in sides
        if side.side == "in" and bool(torch.isin(component[side.labels], its).any())
    ]
    columns = ("in_proj_weight", *SEPARATE)
    return bool(read) and all(side.name.rpartition(".")[2] in columns for side in read)
