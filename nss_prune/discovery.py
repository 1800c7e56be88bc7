"""The neurons of any model, however much of it torch-pruning can follow.

The whole model is traced if that works. Where torch-pruning fails on it, or does not come to an
end, its parts are traced one by one with the inputs that they get in a call of the model: blocks
first, and the blocks inside those that fail. What crosses the border of a part is left alone then;
the neurons hidden inside are found all the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from nss_prune.adapters import ADAPTERS, Adapter, claims
from nss_prune.adapters.trial import adapted_on_trial
from nss_prune.calls import Call, look, recorded_calls, recording
from nss_prune.deadline import deadline
from nss_prune.errors import GraphError, NothingToPruneError
from nss_prune.neurons import (
    MAKES_THE_OUTPUT,
    Forward,
    NeuronGroup,
    NeuronMap,
    call_model,
    find_neurons,
    trace,
)

TIMEOUT = 60.0
"""Seconds that torch-pruning may take to follow a model, unless ``timeout`` says otherwise."""

WHOLE_SHARE = 1 / 3  # of the time: for the model as a whole, the rest for its parts
ROOT_TYPES: tuple[type, ...] = (nn.modules.conv._ConvNd, nn.Linear)
PATIENCE = 2  # failures of a class of modules after which only their children are tried
PART_SHARE = 0.05  # of the time; a part that never ends must leave enough for the others


def discover(
    model: nn.Module,
    example_inputs: Any,
    ignored: Sequence[nn.Module | nn.Parameter] = (),
    *,
    timeout: float = TIMEOUT,
    forward: Forward = call_model,
    adapters: Sequence[Adapter] = ADAPTERS,
) -> NeuronMap:
    """The neurons of a model; it is left as found.

    Args:
        example_inputs: Inputs of one call.
        ignored: Modules whose output channels must stay.
        timeout: Seconds for the whole model and its parts together.
        forward: Function of (model, example_inputs) that gives the outputs.
        adapters: The structures in which neurons are more than channels.

    Raises:
        ArgumentError: Weights are masked or parametrized.
        GraphError: The model does not run, or no part of it can be traced.
        NothingToPruneError: No group is left.
    """
    claimed = list(claims(model, adapters, ignored))
    with recording({module for module, _, _ in claimed}) as calls:
        try:
            with deadline(WHOLE_SHARE * timeout, model):
                graph, output_nodes = trace(model, example_inputs)
                found = find_neurons(model, graph, output_nodes, ignored)
        except GraphError as error:
            rest = (1 - WHOLE_SHARE) * timeout
            found = discover_parts(
                model, example_inputs, ignored, error, timeout=rest, forward=forward
            )
    return adapted_on_trial(model, found, claimed, calls)


def discover_parts(
    model: nn.Module,
    example_inputs: Any,
    ignored: Sequence[nn.Module | nn.Parameter],
    reason: GraphError,
    *,
    timeout: float,
    forward: Forward = call_model,
    root_module_types: Sequence[type] = ROOT_TYPES,
) -> NeuronMap:
    """The neurons of the parts of a model that cannot be traced as a whole, for a ``reason``.

    Raises:
        GraphError: ``reason``, where no part can be traced either.
    """
    search = _Search(ignored, root_module_types, time.monotonic() + timeout, PART_SHARE * timeout)
    calls = recorded_calls(model, example_inputs, forward)
    for name, child in model.named_children():
        search.visit(name, child, calls)
    if not search.groups:
        raise reason
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    order = {name: position for position, name in enumerate(names)}
    note = f"the model was traced in parts, because: {_first_line(reason)}"
    return NeuronMap(
        groups=tuple(sorted(search.groups, key=lambda group: order[group.name])),
        left_alone={name: why for name, (why, _) in search.left_alone.items()},
        left_alone_sizes={name: size for name, (_, size) in search.left_alone.items()},
        notes=(note,),
    )


@dataclass
class _Search:
    """Goes down the modules until each part can be traced, or is a single layer."""

    ignored: Sequence[nn.Module | nn.Parameter]
    root_module_types: Sequence[type]
    end: float
    limit: float
    groups: list[NeuronGroup] = field(default_factory=list)
    left_alone: dict[str, tuple[str, int]] = field(default_factory=dict)
    seen: set[nn.Module] = field(default_factory=set)
    failed: Counter[type] = field(default_factory=Counter)
    known: dict[Any, NeuronMap] = field(default_factory=dict)

    def visit(self, name: str, module: nn.Module, calls: dict[nn.Module, Call]) -> None:
        """Add the neurons of a module, or of its children where it cannot be traced."""
        if self._layers_in(module) < 2 or module in self.seen:
            return
        self.seen.add(module)
        if module in calls and self.failed[type(module)] < PATIENCE:
            try:
                self._add(name, self._traced(module, calls[module]))
                return
            except NothingToPruneError:
                pass
            except GraphError:
                self.failed[type(module)] += type(module) is not nn.Sequential
        for child_name, child in module.named_children():
            self.visit(f"{name}.{child_name}", child, calls)

    def _layers_in(self, module: nn.Module) -> int:
        roots = tuple(self.root_module_types)
        return sum(isinstance(layer, roots) for layer in module.modules())

    def _traced(self, module: nn.Module, call: Call) -> NeuronMap:
        """The neurons of a module; blocks that look the same have the same."""
        inside = {*module.modules(), *module.parameters()}
        if not inside.isdisjoint(self.ignored):
            return self._trace(module, call)
        seen = look(module, call)
        if seen not in self.known:
            self.known[seen] = self._trace(module, call)
        return self.known[seen]

    def _trace(self, module: nn.Module, call: Call) -> NeuronMap:
        remaining = max(0.1, self.end - time.monotonic())
        with deadline(min(self.limit, remaining), module):
            graph, output_nodes = trace(
                module,
                call.arguments,
                forward_fn=lambda part, arguments: part(*arguments, **call.keywords),
            )
            return find_neurons(
                module, graph, output_nodes, self.ignored, tuple(self.root_module_types)
            )

    def _add(self, prefix: str, found: NeuronMap) -> None:
        self.groups += [_with_prefix(group, prefix) for group in found.groups]
        for name, reason in found.left_alone.items():
            reason = "crosses a part" if reason == MAKES_THE_OUTPUT else reason
            self.left_alone[f"{prefix}.{name}"] = (reason, found.left_alone_sizes[name])


def _with_prefix(group: NeuronGroup, prefix: str) -> NeuronGroup:
    members = tuple(
        replace(member, name=f"{prefix}.{member.name}" if member.name else prefix)
        for member in group.members
    )
    return replace(group, name=f"{prefix}.{group.name}", members=members)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
