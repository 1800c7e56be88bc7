"""What a step prunes: a model, its neurons and how to call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from nss_prune.core.models import Forward, call_model, in_dtype
from nss_prune.discovery.head_dimensions import with_head_dimensions
from nss_prune.discovery.samples import readable
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.structures.dimensions import head_widths
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.execute import Pruners
from nss_prune.surgery.removal import remove
from nss_prune.surgery.trial import verified


class Tracer(Protocol):
    """Follows a model through its layers, see :class:`nss_prune.pruner.tracer.Tracer`."""

    @property
    def graph_arguments(self) -> Mapping[str, Any]:
        """Those of torch-pruning's graph, ``output_transform`` among them."""
        ...

    @property
    def untraceable(self) -> Exception | None:
        """Why the model cannot be traced as a whole, or None."""
        ...

    def again(self, model: nn.Module) -> Subject:
        """The model as it is now."""
        ...

    def graph(self, model: nn.Module) -> tuple[Any, set[Any]]:
        """torch-pruning's graph, and the autograd nodes that make the outputs."""
        ...


@dataclass(frozen=True)
class Subject:
    """A model as a step finds it, traced once; nothing here changes while it is read.

    Attributes:
        model: The model itself.
        example_inputs: Inputs of one call.
        neurons: What may be removed, and what is left alone for which reason.
        forward: Function of (model, inputs) that gives the outputs.
        adapters: The structures in which neurons are more than channels.
        customized_pruners: As torch-pruning takes them.
        graph: torch-pruning's dependency graph; None where the model was traced in parts.
        tracer: Traces the model again.
        forward_dtype: Of the forward calls in passes over the data; None for the model's own.
        reads_values: Whether a call is not known to depend on shapes alone.
    """

    model: nn.Module
    example_inputs: Any
    neurons: NeuronMap
    forward: Forward = call_model
    adapters: Sequence[Adapter] = ADAPTERS
    customized_pruners: Pruners | None = None
    graph: Any = None
    tracer: Tracer | None = None
    forward_dtype: torch.dtype | None = None
    reads_values: bool = True

    @property
    def untraceable(self) -> Exception | None:
        """Why the model could not be traced as a whole; None where it could."""
        return None if self.tracer is None else self.tracer.untraceable

    @property
    def groups(self) -> tuple[NeuronGroup, ...]:
        """The neurons that may be removed."""
        return self.neurons.groups

    @property
    def sizes(self) -> dict[str, int]:
        """Layer -> neurons, those inside the heads of each attention module included."""
        return {group.name: group.size for group in self.groups} | head_widths(self.model)

    @property
    def layers(self) -> dict[str, int]:
        """Layer -> neurons that may be removed."""
        return {group.name: group.size for group in self.groups}

    @property
    def calling(self) -> dict[str, Any]:
        """``forward=`` for passes over the data, where the model is not called as usual."""
        forward = in_dtype(self.forward, self.forward_dtype)
        return {} if forward is call_model else {"forward": forward}

    def fresh(self) -> Subject:
        """The model as it is now; what was left alone before stays so, for the same reason.

        Raises:
            GraphError, NothingToPruneError: From tracing the model.
        """
        assert self.tracer is not None
        found = self.tracer.again(self.model)
        neurons = found.neurons.without(self.neurons.left_alone)
        return replace(
            found,
            neurons=neurons,
            forward_dtype=self.forward_dtype,
            reads_values=self.reads_values,
        )

    def on(self, neurons: NeuronMap) -> Subject:
        """The same with other neurons."""
        return replace(self, neurons=neurons)

    def readable(self) -> Subject:
        """The same without the neurons whose consumers see no samples.

        Raises:
            NothingToPruneError: No group is left.
        """
        return self.on(readable(self.model, self.neurons, self.example_inputs, self.forward))

    def with_head_dimensions(self) -> Subject:
        """The same with the dimensions inside heads as neurons, where they may go."""
        return self.on(
            with_head_dimensions(self.model, self.neurons, self.example_inputs, self.forward)
        )

    def verified(self) -> Subject:
        """The same without the groups whose removal fails on trial, which gives the reason.

        Raises:
            NothingToPruneError: No group is left.
        """
        return self.on(
            verified(
                self.model,
                self.neurons,
                self.example_inputs,
                customized_pruners=self.customized_pruners,
                forward=self.forward,
                adapters=self.adapters,
            )
        )

    def restricted(self, critical: Slice) -> Slice:
        """A slice of the neurons that may be removed; those that it does not name stay."""
        kept = {group.name: critical.kept[group.name] for group in self.groups}
        return Slice(kept, self.groups)

    def remove(self, model: nn.Module, critical: Slice) -> None:
        """Remove all outside a slice from the model, or from a copy of it, in place.

        Raises:
            RemovalError: The smaller model would not work; it is then as it was.
        """
        remove(
            model,
            critical,
            self.example_inputs,
            customized_pruners=self.customized_pruners,
            forward=self.forward,
            adapters=self.adapters,
        )
