"""What adapters claim of a model, joined with the traced groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter

Claim = tuple[nn.Module, Adapter, tuple[NeuronGroup, ...]]
"""A module, an adapter that claims it, and the neurons inside."""


def adapted(
    model: nn.Module,
    neurons: NeuronMap,
    adapters: Sequence[Adapter] = ADAPTERS,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
) -> NeuronMap:
    """The map with the neurons that the adapters know, by structure alone.

    Where two adapters claim a module, the first has it. Use
    :func:`nss_prune.discovery.trial.adapted_on_trial` to have each claim tried first.

    Args:
        ignored: Modules whose output channels must stay, and parameters.
    """
    found: dict[nn.Module, tuple[NeuronGroup, ...]] = {}
    for module, _, groups in claims(model, adapters, ignored):
        found.setdefault(module, groups)
    return joined(model, neurons, [group for groups in found.values() for group in groups])


def claims(
    model: nn.Module,
    adapters: Sequence[Adapter] = ADAPTERS,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
) -> Iterator[Claim]:
    """What the adapters claim, in the order of the modules and then of the adapters.

    Nothing is claimed that is ignored, or that modules elsewhere in the model use as well.
    """
    stay, users = _outputs_to_keep(model, ignored), _Users(model)
    for name, module in model.named_modules():
        for adapter in adapters:
            groups = adapter.groups(name, module)
            if not groups or _makers(groups) & stay or users.outside(module, groups):
                continue
            yield module, adapter, groups


def joined(model: nn.Module, neurons: NeuronMap, groups: Sequence[NeuronGroup]) -> NeuronMap:
    """The map with ``groups`` in place of those that share a side of a module with them.

    Of ``groups`` that share a side the first stays.
    """
    claimed: dict[tuple[str, str], str] = {}
    added = []
    for group in groups:
        if not _roots_shared(group, claimed):
            added.append(group)
            claimed.update({(member.name, member.side): group.name for member in group.members})
    clashes = {group.name: _roots_shared(group, claimed) for group in neurons.groups}
    rest = neurons.without(
        {
            name: f"shares channels with the neurons of {', '.join(roots)}"
            for name, roots in clashes.items()
            if roots
        }
    )
    makers = _makers(added)
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    order = {name: position for position, name in enumerate(names)}
    return replace(
        rest,
        groups=tuple(sorted([*rest.groups, *added], key=lambda group: order[group.name])),
        left_alone={name: why for name, why in rest.left_alone.items() if name not in makers},
        left_alone_sizes={
            name: size for name, size in rest.left_alone_sizes.items() if name not in makers
        },
    )


def _roots_shared(group: NeuronGroup, claimed: Mapping[tuple[str, str], str]) -> list[str]:
    """The groups that have claimed a side of a member of a group."""
    sides = [(member.name, member.side) for member in group.members]
    return sorted({claimed[side] for side in sides if side in claimed})


def _makers(groups: Iterable[NeuronGroup]) -> set[str]:
    """Names of the modules and parameters that make the neurons or pass them on."""
    return {member.name for group in groups for member in group.members if member.side != "in"}


def _outputs_to_keep(model: nn.Module, ignored: Sequence[nn.Module | nn.Parameter]) -> set[str]:
    """Names of the modules and parameters whose channels must stay."""
    modules = {
        child for layer in ignored if isinstance(layer, nn.Module) for child in layer.modules()
    }
    parameters = {id(layer) for layer in ignored if isinstance(layer, nn.Parameter)}
    return {name for name, module in model.named_modules() if module in modules} | {
        name for name, value in model.named_parameters() if id(value) in parameters
    }


class _Users:
    """Where the parameters of a model are, to tell which of them modules share."""

    def __init__(self, model: nn.Module) -> None:
        self._layers: dict[str, nn.Module] = {}
        self._names: dict[nn.Module, list[str]] = {}
        for name, layer in model.named_modules(remove_duplicate=False):
            self._layers[name] = layer
            self._names.setdefault(layer, []).append(name)
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._places: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self._parameters.items():
            self._places.setdefault(parameter, []).append(name)

    def outside(self, module: nn.Module, groups: Iterable[NeuronGroup]) -> bool:
        """Whether modules outside of ``module`` use a layer or parameter of its neurons as well."""
        inside = tuple(f"{name}." if name else "" for name in self._names[module])
        found: set[nn.Parameter] = set()
        for member in (member for group in groups for member in group.members):
            if member.name in self._parameters:
                found.add(self._parameters[member.name])
            if member.name in self._layers:
                found.update(self._layers[member.name].parameters())
        return any(
            not name.startswith(inside) for parameter in found for name in self._places[parameter]
        )
