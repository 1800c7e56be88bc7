"""A model -> what a step prunes, traced as a whole or in parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nss_prune.core.models import call_model, evaluation
from nss_prune.discovery.completed import completed
from nss_prune.discovery.parts import discover_parts
from nss_prune.discovery.trial import Verdicts, verdicts_of
from nss_prune.discovery.whole import TIMEOUT, WHOLE_SHARE
from nss_prune.errors import GraphError
from nss_prune.graph.deadline import within
from nss_prune.graph.groups import find_neurons
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.tracing import (
    OutputRecorder,
    as_arguments,
    as_traced,
    call_as_torch_pruning,
    trace,
    traceable,
)
from nss_prune.pruner.subject import Subject

__all__ = ["TIMEOUT", "Tracer"]

GRAPH_ARGUMENTS = ("forward_fn", "output_transform", "customized_pruners", "unwrapped_parameters")

ROOT_TYPES = inspect.signature(tp.pruner.BasePruner).parameters["root_module_types"].default


Build = Callable[[OutputRecorder, Sequence[nn.Module]], Any]
"""Function of (output_transform, layers to ignore) that gives torch-pruning's graph."""


@dataclass(frozen=True)
class Tracer:
    """How a model is followed.

    Attributes:
        example_inputs: Inputs of one call.
        forward: Function of (model, inputs) that gives the outputs.
        ignored: Modules whose output channels must stay, and parameters.
        root_module_types: Types of the layers whose outputs are neurons.
        graph_arguments: ``forward_fn``, ``output_transform``, ``customized_pruners`` and
            ``unwrapped_parameters``, where they are given, as torch-pruning takes them.
        adapters: The structures in which neurons are more than channels.
        timeout: Seconds of CPU time.
        needs_graph: Whether parts will not do.
        untraceable: Why the model cannot be traced as a whole; None where it can.
    """

    example_inputs: Any
    forward: Callable[[nn.Module, Any], Any]
    ignored: Sequence[nn.Module | nn.Parameter]
    root_module_types: Sequence[type]
    graph_arguments: Mapping[str, Any]
    adapters: Sequence[Any]
    timeout: float
    needs_graph: bool
    untraceable: GraphError | None = None

    @staticmethod
    def of(
        example_inputs: Any,
        arguments: Mapping[str, Any],
        adapters: Sequence[Any],
        timeout: float,
        needs_graph: bool,
    ) -> Tracer:
        """By the arguments of torch-pruning's pruners, see :func:`own_arguments`."""
        given = {name: arguments[name] for name in GRAPH_ARGUMENTS if name in arguments}
        types = arguments.get("root_module_types", ROOT_TYPES)
        forward = arguments.get("forward_fn") or call_model
        ignored = tuple(arguments["ignored_layers"])
        return Tracer(
            example_inputs, forward, ignored, types, given, tuple(adapters), timeout, needs_graph
        )

    @property
    def arguments(self) -> Any:
        """The example inputs as torch-pruning takes them."""
        return as_arguments(self.example_inputs)

    @property
    def forward_fn(self) -> Callable[[nn.Module, Any], Any]:
        """The one given, or what torch-pruning does by itself but for catching interrupts."""
        return self.graph_arguments.get("forward_fn") or call_as_torch_pruning

    def first(self, model: nn.Module, build: Build) -> Subject:
        """The subject of the first step.

        Args:
            build: Builds torch-pruning's graph, with the recorder as its ``output_transform``, and
                without looking at some layers.

        Raises:
            GraphError: No part of the model can be traced, or parts will not do.
            NothingToPruneError: No group is left.
        """
        tracer, graph, verdicts, reads = self, None, Verdicts(), True
        with traceable(model):
            try:
                verdicts = self._verdicts(model)
                graph, found, reads = within(
                    WHOLE_SHARE * self.timeout, model, lambda: self._built(model, build, verdicts)
                )
            except Exception as error:
                graph, tracer = None, replace(self, untraceable=self._in_words(model, error))
                found = tracer._neurons_in_parts(model)
        completed = tracer._completed(model, graph, found, verdicts)
        return replace(tracer._subject(model, graph, completed), reads_values=reads)

    def again(self, model: nn.Module) -> Subject:
        """The subject of a further step, traced as that of the first.

        Raises:
            GraphError, NothingToPruneError: As :meth:`first`.
        """
        graph = None
        with traceable(model):
            verdicts = self._verdicts(model)
        if self.untraceable is not None:
            found = self._neurons_in_parts(model)
        else:
            graph, found = within(self.timeout, model, lambda: self._traced(model, verdicts))
        return self._subject(model, graph, self._completed(model, graph, found, verdicts))

    def _built(
        self, model: nn.Module, build: Build, verdicts: Verdicts
    ) -> tuple[Any, NeuronMap, bool]:
        """torch-pruning's graph, the neurons, and whether the call reads values."""
        recorder = OutputRecorder(self.graph_arguments.get("output_transform"))
        graph = build(recorder, [model.get_submodule(name) for name in verdicts.uneven])
        neurons = self._neurons(model, graph, recorder.nodes, verdicts)
        return graph, neurons, recorder.reads_values

    def _traced(self, model: nn.Module, verdicts: Verdicts) -> tuple[Any, NeuronMap]:
        graph, output_nodes = self.graph(model)
        return graph, self._neurons(model, graph, output_nodes, verdicts)

    def graph(self, model: nn.Module) -> tuple[Any, set[Any]]:
        """torch-pruning's graph, and the autograd nodes that make the outputs."""
        arguments = dict(self.graph_arguments)
        # A list of its own: torch-pruning appends to it.
        arguments["unwrapped_parameters"] = list(arguments.get("unwrapped_parameters") or ())
        ignored = [layer for layer in self.ignored if isinstance(layer, nn.Parameter)]
        return trace(model, self.example_inputs, ignored_params=ignored, **arguments)

    def _verdicts(self, model: nn.Module) -> Verdicts:
        """What became of the claims of the adapters, tried with the inputs of one call."""
        called = as_traced(self.forward, self.example_inputs)
        return verdicts_of(model, self.adapters, self.ignored, *called)

    def _neurons(
        self, model: nn.Module, graph: Any, output_nodes: set[Any], verdicts: Verdicts
    ) -> NeuronMap:
        types, apart = self.root_module_types, verdicts.makers
        return find_neurons(model, graph, output_nodes, self.ignored, types, apart)

    def _neurons_in_parts(self, model: nn.Module) -> NeuronMap:
        assert self.untraceable is not None
        if self.needs_graph:
            raise self.untraceable
        return discover_parts(
            model,
            self.example_inputs,
            self.ignored,
            self.untraceable,
            timeout=(1 - WHOLE_SHARE) * self.timeout,
            forward=self.forward,
        )

    def _completed(
        self, model: nn.Module, graph: Any, found: NeuronMap, verdicts: Verdicts
    ) -> NeuronMap:
        """The traced neurons with those that are more than channels.

        Raises:
            GraphError, NothingToPruneError: No group is left.
        """
        return completed(
            model,
            found,
            verdicts,
            self.example_inputs,
            ignored=self.ignored,
            forward=self.forward,
            customized_pruners=self.graph_arguments.get("customized_pruners"),
            graph=graph,
            untraceable=self.untraceable,
        )

    def _subject(self, model: nn.Module, graph: Any, neurons: NeuronMap) -> Subject:
        return Subject(
            model,
            self.example_inputs,
            neurons,
            self.forward,
            self.adapters,
            self.graph_arguments.get("customized_pruners"),
            graph,
            self,
        )

    def _in_words(self, model: nn.Module, error: Exception) -> GraphError:
        """torch-pruning's error in our words, or the model's own where it does not run."""
        if isinstance(error, GraphError):
            return error
        try:
            with evaluation(model), torch.no_grad():
                self.forward(model, self.example_inputs)
        except Exception as own:
            return GraphError(
                f"{type(model).__name__} does not run on the example inputs: {own}; give the "
                "inputs of one call: a tensor, a tuple of arguments or a dict"
            )
        recurrent = [name for name, m in model.named_modules() if isinstance(m, nn.RNNBase)]
        if recurrent and isinstance(error, IndexError):  # of its index mappings
            return GraphError(
                f"torch-pruning, by whose graph pruning_ratio and importance= choose, does not "
                f"follow the hidden units of {recurrent[0]!r} to the layers behind it "
                f"({type(error).__name__}: {error}); a budget or theta, without importance=, "
                "prunes recurrent layers too"
            )
        return GraphError(
            f"torch-pruning could not trace {type(model).__name__}: {type(error).__name__}: "
            f"{error}; with a budget or theta, without importance=, its parts are traced one by one"
        )
