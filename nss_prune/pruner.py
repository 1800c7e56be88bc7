"""NSSPruner: the drop-in pruner over profile, slice and removal."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from nss_prune.categories import Categories, check_categories
from nss_prune.collector import Loss
from nss_prune.contributions import Contribution, metric_named
from nss_prune.errors import ArgumentError, GraphError, ModelMismatchError
from nss_prune.importance import NSSImportance
from nss_prune.neurons import (
    NeuronMap,
    OutputRecorder,
    as_arguments,
    call_model,
    find_neurons,
    refuse_reparametrised,
    resolve_layers,
    trace,
    traceable,
)
from nss_prune.profile import Profile, profile_neurons
from nss_prune.removal import remove
from nss_prune.report import Cost, Report, Row, measure
from nss_prune.similarity import Features, Landscape
from nss_prune.slicing import STRATEGIES, Slice, Strategy, check_theta

DICT_ARGUMENTS = ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups")


class NSSPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """Semantic slicing with the interface of torch-pruning's pruners.

    With nothing but ``theta``, a step removes every neuron outside the semantic slice at θ. With
    ``pruning_ratio``, that share of each layer's neurons goes instead, in the order of the
    semantic importance (of all layers together with ``global_pruning=True``). With
    ``importance``, torch-pruning's own criterion ranks the neurons.

    Args:
        model: The model, pruned in place by :meth:`step`.
        example_inputs: Inputs of one call: a tensor, a tuple of arguments or a dict.
        importance: A torch-pruning importance that replaces semantic slicing.
        data: Batches of (inputs, labels) on the model's device; the example inputs by default,
            with the predictions as categories.
        theta: Similarity threshold in (0, 1]. Over several ``iterative_steps`` it falls from 1
            in equal steps, and each step profiles the model anew, so ``data`` must be an
            iterable that can be run through again.
        pruning_ratio: Share of the neurons to remove, in [0, 1).
        metric: Contribution metric, by name or as an object.
        strategy: "semantic", or with ``pruning_ratio`` "category" or "global": the best of each
            category and their union, or the best over all data, of every layer.
        categories: See :func:`nss_prune.profile`; "labels" by default where there is data.
        features: See :func:`nss_prune.profile`.
        loss: See :func:`nss_prune.profile`.
        profile: A profile of this model, instead of ``data``.
        progress: Show a progress bar; by default when stderr is a terminal.
        **torch_pruning_arguments: As ``torch_pruning.pruner.BasePruner`` takes them.
            ``ignored_layers`` may hold modules, types and names; the layers that make the
            model's output are left alone without being named.

    Attributes:
        report: What the last step did, or None.

    Raises:
        ArgumentError: An argument is outside what it may be.
        GraphError, NothingToPruneError: From tracing the model.
    """

    current_step: int

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[..., Any] | None = None,
        *,
        data: Iterable[Any] | None = None,
        theta: float = 0.95,
        pruning_ratio: float | None = None,
        metric: str | Contribution = "taylor",
        strategy: Strategy = "semantic",
        categories: Categories = "labels",
        features: Features = "pixel",
        loss: Loss | None = None,
        profile: Profile | None = None,
        progress: bool | None = None,
        **torch_pruning_arguments: Any,
    ) -> None:
        self.theta = check_theta(theta)
        self.metric = metric_named(metric)
        check_categories(categories)
        ratio = _check_ratio(pruning_ratio)
        _check_strategy(strategy, ratio, importance)
        refuse_reparametrised(model)
        self.data = data
        self.strategy = strategy
        self.categories = categories
        self.landscape = Landscape(features)
        self.loss = loss
        self.progress = progress
        self.report: Report | None = None
        self._by_theta = importance is None and ratio is None
        self._share = ratio
        self._example_inputs = example_inputs
        self._forward_fn = torch_pruning_arguments.get("forward_fn")
        self._graph_arguments: dict[str, Any] = {}
        self._profile = profile
        self._slice: Slice | None = None
        self._ranking: NSSImportance | None = None
        self._stale = False
        arguments = own_arguments(model, torch_pruning_arguments)
        if ratio is not None:
            arguments["pruning_ratio"] = ratio
        self._construct(model, importance or self._semantic_importance, arguments)
        if profile is not None:
            self._check_profile(profile)
        if importance is None and data is None and profile and self.iterative_steps > 1:
            raise ArgumentError(
                f"iterative_steps is {self.iterative_steps} with a profile of the first step "
                "only; give data= as well, to profile the further steps"
            )

    def _construct(
        self, model: nn.Module, importance: Callable[..., Any], arguments: dict[str, Any]
    ) -> None:
        """torch-pruning's constructor, but the model is left as found."""
        self._graph_arguments = {
            key: arguments[key]
            for key in ("forward_fn", "output_transform", "customized_pruners")
            if key in arguments
        }
        self._unwrapped = list(arguments.get("unwrapped_parameters") or ())
        recorder = OutputRecorder(arguments.pop("output_transform", None))
        inputs = as_arguments(self._example_inputs)
        with traceable(model):
            try:
                super().__init__(model, inputs, importance, output_transform=recorder, **arguments)
            except Exception as error:
                raise GraphError(
                    f"torch-pruning could not trace {type(model).__name__}: {error}; check that "
                    "model(*example_inputs) runs"
                ) from error
        self._set_neurons(recorder.nodes)

    def _set_neurons(self, output_nodes: set[Any]) -> None:
        ignored = [*self.ignored_layers, *self.ignored_params]
        self.neurons = find_neurons(
            self.model, self.DG, output_nodes, ignored, self.root_module_types
        )
        # torch-pruning's own ranking must leave alone what we leave alone.
        known = set(self.ignored_layers)
        modules = (self.model.get_submodule(name) for name in self.neurons.left_alone)
        self.ignored_layers.extend(module for module in modules if module not in known)

    def _refresh(self) -> None:
        """Trace and profile anew after an earlier step."""
        if not self._stale:
            return
        self.DG, output_nodes = trace(
            self.model,
            self._example_inputs,
            ignored_params=self.ignored_params,
            unwrapped_parameters=list(self._unwrapped),
            **self._graph_arguments,
        )
        self._set_neurons(output_nodes)
        self._profile = self._slice = self._ranking = None
        self._stale = False

    def _check_profile(self, profile: Profile) -> None:
        sizes = {group.name: group.size for group in self.neurons.groups}
        if any(profile.layers.get(name) != size for name, size in sizes.items()):
            raise ModelMismatchError(
                f"the profile has the layers {profile.layers}, the model {sizes}; profile this "
                "model as it is, with the same ignored_layers"
            )

    @property
    def profile(self) -> Profile:
        """The profile; made on first use, and anew for every further step."""
        if self._profile is None:
            self._profile = (
                self._profile_data() if self.data is not None else self._profile_inputs()
            )
        return self._profile

    def _profile_data(self) -> Profile:
        assert self.data is not None
        return self._profile_of(self.data, self.categories, minimum_samples=2)

    def _profile_inputs(self) -> Profile:
        inputs = self._example_inputs
        if isinstance(inputs, (tuple, list)) and len(inputs) == 1:
            inputs = inputs[0]
        categories = "predicted" if self.categories == "labels" else self.categories
        profile = self._profile_of([(inputs, None)], categories, minimum_samples=1)
        warnings.warn(
            f"no data was given: the example inputs ({sum(profile.samples)} sample(s)) are "
            "profiled, with the model's predictions as categories; pass data=, batches of "
            "(inputs, labels), for slices that hold on other inputs",
            stacklevel=2,
        )
        return profile

    def _profile_of(
        self, data: Iterable[Any], categories: Categories, minimum_samples: int
    ) -> Profile:
        return profile_neurons(
            self.model,
            data,
            self.neurons,
            metrics=(self.metric,),
            categories=categories,
            landscape=self.landscape,
            loss=self.loss,
            progress=self.progress,
            minimum_samples=minimum_samples,
        )

    def _semantic_importance(self, group: Any) -> Any:
        if self._ranking is None:
            self._ranking = NSSImportance(self.profile)
        return self._ranking(group)

    @property
    def slice(self) -> Slice:
        """The critical neurons: what the next step keeps, or what the last one kept."""
        if self._slice is None:
            self._slice = self._make_slice()
        return self._slice

    def _make_slice(self) -> Slice:
        done = max(self.current_step, 1) / self.iterative_steps
        if self._by_theta:
            return self.profile.slice(1 - (1 - self.theta) * done)
        if self.strategy == "semantic":
            return self._slice_by_ranking()
        assert self._share is not None
        # The profile is of the model as the last step left it; the share is of the first one.
        left = 1 - self._share * (done - 1 / self.iterative_steps)
        return self.profile.slice(ratio=(1 - self._share * done) / left, strategy=self.strategy)

    def _slice_by_ranking(self) -> Slice:
        """What torch-pruning's own ranking keeps, read off without pruning anything."""
        kept = {
            group.name: torch.ones(group.size, dtype=torch.bool) for group in self.neurons.groups
        }
        step = self.current_step
        self.current_step = max(step, 1)
        try:
            for group in self._prune():
                name = self.DG._module2name[group[0].dep.target.module]
                kept[name][group[0].idxs] = False
        finally:
            self.current_step = step
        return Slice(kept, self.neurons.groups)

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Remove the neurons of this step.

        Args:
            interactive: Yield torch-pruning groups instead, each with the neurons to remove, for
                the caller to ``.prune()``. Nothing is checked or undone then.

        Raises:
            DataError, NumericalError: The data cannot be used.
            RemovalError: The smaller model would not work. In every case the model is as before.
        """
        if self.current_step >= self.iterative_steps:
            warnings.warn(
                f"all {self.iterative_steps} step(s) are done, nothing was pruned; make a new "
                "pruner, or pass iterative_steps=",
                stacklevel=2,
            )
            return iter(()) if interactive else None
        self.current_step += 1
        try:
            self._refresh()
            critical = self.slice
            if interactive:
                return self._groups(critical)
            before = measure(self.model, self._example_inputs, self._forward)
            remove(
                self.model,
                critical,
                self._example_inputs,
                customized_pruners=self.DG.CUSTOMIZED_PRUNERS,
                forward=self._forward,
            )
        except BaseException:
            self.current_step -= 1
            raise
        self._stale = True
        after = measure(self.model, self._example_inputs, self._forward)
        self.report = make_report(self.model, critical, self.neurons, before, after, self._notes())
        return None

    def _groups(self, critical: Slice) -> Iterator[Any]:
        self._stale = True
        for name, neurons in critical.removed.items():
            module = self.model.get_submodule(name)
            function = self.DG.get_pruner_of_module(module).prune_out_channels
            yield self.DG.get_pruning_group(module, function, neurons.tolist())

    def _notes(self) -> tuple[str, ...]:
        return () if self._profile is None else self._profile.notes

    def _forward(self, model: nn.Module, inputs: Any) -> Any:
        return (
            call_model(model, inputs)
            if self._forward_fn is None
            else self._forward_fn(model, inputs)
        )


def own_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of what torch-pruning would change, in the forms that it understands.

    Raises:
        ArgumentError: torch-pruning has no such argument, or ignored_layers names a stranger.
    """
    known = set(inspect.signature(tp.pruner.BasePruner).parameters) - {"self"}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ArgumentError(
            f"there is no argument {', '.join(unknown)}; NSSPruner takes its own and those of "
            f"torch_pruning.pruner.BasePruner: {', '.join(sorted(known))}"
        )
    own = dict(arguments)
    for name in DICT_ARGUMENTS:
        own[name] = dict(own.get(name) or {})
    own["ignored_layers"] = resolve_layers(model, own.get("ignored_layers"))
    unwrapped = own.get("unwrapped_parameters") or ()
    pairs = unwrapped.items() if isinstance(unwrapped, Mapping) else unwrapped
    own["unwrapped_parameters"] = [tuple(pair) for pair in pairs]
    return own


def _check_ratio(ratio: float | None) -> float | None:
    if ratio is not None and not 0 <= ratio < 1:
        raise ArgumentError(f"pruning_ratio is {ratio!r}; it is the share to remove, in [0, 1)")
    return ratio


def _check_strategy(strategy: str, ratio: float | None, importance: Any) -> None:
    if strategy not in STRATEGIES:
        raise ArgumentError(f"strategy is {strategy!r}; use one of {STRATEGIES}")
    if strategy != "semantic" and (ratio is None or importance is not None):
        raise ArgumentError(
            f"strategy={strategy!r} takes a share of the ranking: give pruning_ratio=, and no "
            "importance="
        )


def make_report(
    model: nn.Module,
    critical: Slice,
    neurons: NeuronMap,
    before: Cost,
    after: Cost,
    notes: tuple[str, ...],
) -> Report:
    """A row for each layer that has neurons, in the order of the model's modules."""
    rows = {
        group.name: Row(group.name, group.size, int(critical.kept[group.name].sum()))
        for group in neurons.groups
    }
    for name, reason in neurons.left_alone.items():
        size = neurons.left_alone_sizes[name]
        rows[name] = Row(name, size, size, reason)
    order = [name for name, _ in model.named_modules() if name in rows]
    return Report(tuple(rows[name] for name in order), before, after, notes)
