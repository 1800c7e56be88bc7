"""The neurons of a model that cannot be traced as a whole, part by part."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from nss_prune.core.models import Forward, call_model
from nss_prune.core.text import first_line
from nss_prune.discovery.calls import Call, look, recorded_calls
from nss_prune.errors import GraphError
from nss_prune.graph.deadline import within
from nss_prune.graph.groups import MAKES_THE_OUTPUT, find_neurons
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.tracing import trace

ROOT_TYPES: tuple[type, ...] = (nn.modules.conv._ConvNd, nn.Linear)
PATIENCE = 2  # failures of a class of modules after which only their children are tried
PART_SHARE = 0.05  # of the time; a part that never ends must leave enough for the others


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

    There may be none.
    """
    search = _Search(ignored, root_module_types, timeout, PART_SHARE * timeout)
    parents = [module for module in model.modules() if next(module.children(), None) is not None]
    calls = recorded_calls(model, parents, example_inputs, forward)
    for name, child in model.named_children():
        search.visit(name, child, calls)
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    order = {name: position for position, name in enumerate(names)}
    note = f"the model was traced in parts, because: {first_line(reason)}"
    return NeuronMap(
        groups=tuple(sorted(search.groups, key=lambda group: order[group.name])),
        left_alone={name: why for name, (why, _) in search.left_alone.items()},
        left_alone_sizes={name: size for name, (_, size) in search.left_alone.items()},
        notes=(note,),
    )


@dataclass
class _Search:
    """Goes down the modules until each part can be traced, or is a single layer.

    Attributes:
        left: Seconds of CPU time for all parts that are still to come.
        limit: And for any one of them.
    """

    ignored: Sequence[nn.Module | nn.Parameter]
    root_module_types: Sequence[type]
    left: float
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
                found = self._traced(module, calls[module])
                if found.groups:
                    self._add(name, found)
                    return
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
        seconds = min(self.limit, max(0.1, self.left))
        return within(seconds, module, lambda: self._timed(module, call))

    def _timed(self, module: nn.Module, call: Call) -> NeuronMap:
        start = time.thread_time()
        try:
            return self._followed(module, call)
        finally:
            self.left -= time.thread_time() - start

    def _followed(self, module: nn.Module, call: Call) -> NeuronMap:
        graph, output_nodes = trace(
            module, call.arguments, forward_fn=lambda part, _: call.on(part)
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
