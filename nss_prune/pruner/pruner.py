"""NSSPruner: the drop-in pruner over profile, slice and removal."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from nss_prune.allocation.budget import (
    TOLERANCE,
    Limits,
    ShareOf,
    limited,
    mac_share,
    parameter_share,
    solve,
)
from nss_prune.allocation.divergence import allocate
from nss_prune.allocation.effects import measured
from nss_prune.allocation.elimination import Elimination, eliminations
from nss_prune.allocation.importance import NSSImportance
from nss_prune.allocation.latency import Latency
from nss_prune.compensation.balance import Balanced, ClassShares, class_shares
from nss_prune.compensation.balance import balance as balance_classes
from nss_prune.compensation.folding import Folded
from nss_prune.compensation.folding import fold as fold_into_readers
from nss_prune.compensation.recalibration import (
    NormStatistics,
    kept_statistics,
    norm_statistics,
    recalibrate,
    running_norms,
)
from nss_prune.compensation.refit import refit
from nss_prune.core.models import call_model, meta_copy
from nss_prune.core.processes import processes
from nss_prune.core.undo import undone_on_error
from nss_prune.core.views import views_of
from nss_prune.discovery.calls import recording
from nss_prune.discovery.claims import Claim, claims
from nss_prune.discovery.parts import discover_parts
from nss_prune.discovery.samples import readable
from nss_prune.discovery.trial import adapted_on_trial
from nss_prune.discovery.whole import TIMEOUT, WHOLE_SHARE
from nss_prune.errors import (
    ArgumentError,
    GraphError,
    ModelMismatchError,
    NothingToPruneError,
    RemovalError,
)
from nss_prune.graph.costs import macs_by_module, measure
from nss_prune.graph.deadline import deadline
from nss_prune.graph.groups import find_neurons
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.norms import least_neurons
from nss_prune.graph.slices import Slice
from nss_prune.graph.tracing import (
    OutputRecorder,
    as_arguments,
    refuse_reparametrised,
    trace,
    traceable,
)
from nss_prune.profiling.accumulation import Loss
from nss_prune.profiling.categories import Categories, check_categories
from nss_prune.profiling.contributions.protocol import Contribution, metric_named
from nss_prune.profiling.profile import Profile
from nss_prune.profiling.run import profile_neurons
from nss_prune.profiling.selection import Strategy, check_theta
from nss_prune.profiling.similarity import Features, Landscape
from nss_prune.pruner.arguments import (
    check_budgets,
    check_fold,
    check_ratio,
    check_repeatable,
    check_strategy,
    own_arguments,
)
from nss_prune.pruner.report import Report, Row, report_rows
from nss_prune.pruner.wrapper import wrap_again
from nss_prune.statistics.consumers import ConsumerSums, consumer_statistics
from nss_prune.statistics.moments import ConsumerStatistics
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter
from nss_prune.surgery.removal import remove
from nss_prune.surgery.trial import verified


@dataclass(frozen=True)
class _Counted:
    """A report whose costs are still to be counted: models without values, before and after."""

    rows: tuple[Row, ...]
    before: nn.Module
    after: nn.Module
    notes: tuple[str, ...]


class NSSPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """Semantic slicing with the interface of torch-pruning's pruners.

    With nothing but ``theta``, a step removes every neuron outside the semantic slice at θ. With
    ``pruning_ratio``, that share of each layer's neurons goes instead, in the order of the
    semantic importance (of all layers together with ``global_pruning=True``). With
    ``importance``, torch-pruning's own criterion ranks the neurons. With ``params_budget``,
    ``macs_budget`` or ``latency_budget``, the model is kept within that share of its cost.

    Where torch-pruning cannot follow the model as a whole, its parts are pruned one by one. Groups
    of neurons whose removal does not work are found on trial and left alone; the report names
    them with the reason.

    Args:
        model: The model, pruned in place by :meth:`step`. DataParallel and
            DistributedDataParallel are unwrapped, and the latter wraps the smaller model again; its
            processes must be given the same profile, or all their shards of the data.
        example_inputs: Inputs of one call: a tensor, a tuple of arguments or a dict.
        importance: A torch-pruning importance that replaces semantic slicing.
        data: Batches of (inputs, labels) on the model's device; the example inputs by default,
            with the predictions as categories. :class:`nss_prune.Views` makes more of few samples.
        theta: Similarity threshold in (0, 1]. Over several ``iterative_steps`` it falls from 1
            in equal steps, and each step profiles the model anew, so ``data`` must be an
            iterable that can be run through again.
        pruning_ratio: Share of the neurons to remove, in [0, 1).
        macs_budget: Share of the multiply-accumulates of one call to keep, in (0, 1].
        params_budget: Share of the parameters to keep, in (0, 1]. The report says so where a
            budget cannot be met within 1 %.
        latency_budget: Share of the seconds of one call with the example inputs to keep, in
            (0, 1], as predicted from timing the model at four widths (see
            :mod:`nss_prune.allocation.latency`): best on a machine with nothing else to do, with
            ``round_to`` and the batch size that count, in one process. Timings differ from run to
            run, and so does what is kept.
        metric: Contribution metric, by name or as an object.
        strategy: "semantic", the paper's rule: one θ for all layers. With ``pruning_ratio`` also
            "category" or "global": the best of each category and their union, or the best over all
            data, of every layer. With a budget also "divergence": as many neurons of each layer
            as make the outputs diverge least for the cost that they save, after folding (see
            :mod:`nss_prune.allocation.divergence`); that is the default for a budget with ``data``,
            unless a ``profile`` or a ``loss`` is given.
        categories: See :func:`nss_prune.profile`; "labels" by default where there is data.
        features: See :func:`nss_prune.profile`.
        loss: See :func:`nss_prune.profile`.
        fold: Fold the removed neurons into their readers (see
            :mod:`nss_prune.compensation.folding`), from what the readers read of ``data``, or of
            the data of a ``profile`` that kept it. False is the paper's plain removal. Example
            inputs alone are not folded from. "refit" goes on in the order of the network: each
            reader also makes up for what those before it changed, at the price of a pass over
            ``data`` for every reader. The data must be a list or a DataLoader, of one process.
        recalibrate: Move the running statistics of BatchNorms by as much as what they read of
            ``data`` moved (see :mod:`nss_prune.compensation.recalibration`): two more forward
            passes, and much accuracy after deep cuts. The data must be a list or a DataLoader, of
            one process.
        balance: Shift the class scores so that each class of ``data`` gets as much probability as
            the whole model gave it (see :mod:`nss_prune.compensation.balance`): two more forward
            passes, and no class is sacrificed for others after deep cuts. The outputs must be
            scores of which softmax makes probabilities. The data must be a list or a DataLoader, of
            one process.
        profile: A profile of this model, instead of ``data``.
        timeout: Seconds that torch-pruning may take to follow the model, and its parts if it
            cannot.
        adapters: The structures in which neurons are more than channels, such as heads; see
            :mod:`nss_prune.structures` for one of your own.
        progress: Show a progress bar; by default when stderr is a terminal.
        **torch_pruning_arguments: As ``torch_pruning.pruner.BasePruner`` takes them.
            ``ignored_layers`` may hold modules, types and names; the layers that make the
            model's output are left alone without being named. Attention is pruned by whole heads
            (``prune_num_heads`` with a ratio), never inside them: ``prune_head_dims`` has no
            effect.

    Raises:
        ArgumentError: An argument is outside what it may be.
        GraphError, NothingToPruneError: From tracing the model.
    """

    DG: Any
    current_step: int
    ignored_layers: list[nn.Module]
    ignored_params: list[nn.Parameter]
    round_to: int | None
    max_pruning_ratio: float
    prune_num_heads: bool
    num_heads: dict[nn.Module, int]

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Callable[..., Any] | None = None,
        *,
        data: Iterable[Any] | None = None,
        theta: float = 0.95,
        pruning_ratio: float | None = None,
        macs_budget: float | None = None,
        params_budget: float | None = None,
        latency_budget: float | None = None,
        metric: str | Contribution = "taylor",
        strategy: Strategy | Literal["divergence"] | None = None,
        categories: Categories = "labels",
        features: Features = "pixel",
        loss: Loss | None = None,
        fold: bool | Literal["refit"] = True,
        recalibrate: bool = False,
        balance: bool = False,
        profile: Profile | None = None,
        timeout: float = TIMEOUT,
        adapters: Sequence[Adapter] = ADAPTERS,
        progress: bool | None = None,
        **torch_pruning_arguments: Any,
    ) -> None:
        self.theta = check_theta(theta)
        self.metric = metric_named(metric)
        check_categories(categories)
        ratio = check_ratio(pruning_ratio)
        budgets = {
            "params_budget": params_budget,
            "macs_budget": macs_budget,
            "latency_budget": latency_budget,
        }
        self._budgets = check_budgets(budgets, ratio, importance)
        foresees = bool(self._budgets) and data is not None and processes() == 1
        if strategy is None:
            plain = profile is not None or loss is not None
            strategy = "divergence" if foresees and not plain else "semantic"
        check_strategy(strategy, ratio, importance, foresees)
        check_fold(fold, data)
        if recalibrate:
            check_repeatable("recalibrate=True", data)
        if balance:
            check_repeatable("balance=True", data)
        if not timeout > 0:
            raise ArgumentError(f"timeout is {timeout!r}; give a number of seconds above 0")
        self.timeout = timeout
        self.adapters = tuple(adapters)
        refuse_reparametrised(model)
        self.wrapper = model if isinstance(model, (DataParallel, DistributedDataParallel)) else None
        model = model if self.wrapper is None else self.wrapper.module
        self.data = data
        self.strategy = strategy
        self.categories = categories
        self.landscape = Landscape(features)
        self.loss = loss
        self.fold = fold
        self.recalibrate = recalibrate
        self.balance = balance
        self._class_shares: ClassShares | None = None
        self._balanced: Balanced | None = None
        self._folded: Folded | None = None
        self.progress = progress
        self._report: Report | _Counted | None = None
        self._by_theta = importance is None and ratio is None and not self._budgets
        self._share = ratio
        self._example_inputs = example_inputs
        self._forward_fn = torch_pruning_arguments.get("forward_fn")
        self._graph_arguments: dict[str, Any] = {}
        self._profile = profile
        self._slice: Slice | None = None
        self._eliminations: dict[str, Elimination] | None = None
        self._statistics: dict[str, ConsumerStatistics] | None = None
        self._ranking: NSSImportance | None = None
        self._stale = False
        arguments = own_arguments(model, torch_pruning_arguments)
        if ratio is not None:
            arguments["pruning_ratio"] = ratio
        self._own_criterion = importance is not None
        self._shortfall: tuple[str, ...] = ()
        self._construct(model, importance or self._semantic_importance, arguments)
        self._sizes = {group.name: group.size for group in self.neurons.groups}
        self._whole = self._cost_with_budget()
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
        ignored = [*arguments["ignored_layers"]]
        claimed, modules = self._claims(model, ignored)
        with recording(modules) as calls, traceable(model):
            try:
                with deadline(WHOLE_SHARE * self.timeout, model):
                    super().__init__(
                        model, inputs, importance, output_transform=recorder, **arguments
                    )
                    found = self._neurons_of(self.DG, recorder.nodes)
            except NothingToPruneError:
                raise
            except Exception as error:
                found = self._construct_in_parts(model, ignored, arguments, error)
        self._set_neurons(adapted_on_trial(model, found, claimed, calls))

    def _claims(
        self, model: nn.Module, ignored: Sequence[nn.Module | nn.Parameter]
    ) -> tuple[list[Claim], set[nn.Module]]:
        """What the adapters claim, and the modules that it is about."""
        claimed = list(claims(model, self.adapters, ignored))
        return claimed, {module for module, _, _ in claimed}

    def _construct_in_parts(
        self,
        model: nn.Module,
        ignored: Sequence[Any],
        arguments: Mapping[str, Any],
        error: Exception,
    ) -> NeuronMap:
        """What torch-pruning's constructor would have set, without its graph."""
        self.DG = None
        self.ignored_layers = [layer for layer in ignored if isinstance(layer, nn.Module)]
        self.ignored_params = [layer for layer in ignored if isinstance(layer, nn.Parameter)]
        defaults = inspect.signature(tp.pruner.BasePruner).parameters
        self.num_heads = dict(arguments["num_heads"])
        for name in ("iterative_steps", "round_to", "max_pruning_ratio", "root_module_types"):
            setattr(self, name, arguments.get(name, defaults[name].default))
        self.current_step = 0
        self._untraceable = error if isinstance(error, GraphError) else untraceable(model, error)
        if self._needs_graph:
            raise self._untraceable
        return self._neurons_in_parts()

    @property
    def _needs_graph(self) -> bool:
        """Whether torch-pruning itself decides what goes."""
        return not (self._by_theta or self._budgets or self.strategy != "semantic")

    def _neurons_of(self, graph: Any, output_nodes: set[Any]) -> NeuronMap:
        ignored: list[nn.Module | nn.Parameter] = [*self.ignored_layers, *self.ignored_params]
        return find_neurons(self.model, graph, output_nodes, ignored, self.root_module_types)

    def _neurons_in_parts(self) -> NeuronMap:
        return discover_parts(
            self.model,
            self._example_inputs,
            [*self.ignored_layers, *self.ignored_params],
            self._untraceable,
            timeout=(1 - WHOLE_SHARE) * self.timeout,
            forward=self._forward,
        )

    def _set_neurons(self, found: NeuronMap) -> None:
        """Keep what can be removed; torch-pruning must leave alone what we leave alone."""
        self.neurons = found
        known = set(self.ignored_layers)
        modules = (self.model.get_submodule(name) for name in self.neurons.left_alone)
        self.ignored_layers.extend(module for module in modules if module not in known)

    def _refresh(self) -> None:
        """Trace and profile anew after an earlier step."""
        if not self._stale:
            return
        claimed, modules = self._claims(self.model, [*self.ignored_layers, *self.ignored_params])
        with recording(modules) as calls:
            if self.DG is None:
                found = self._neurons_in_parts()
            else:
                with deadline(self.timeout, self.model):
                    self.DG, output_nodes = self._trace()
                    found = self._neurons_of(self.DG, output_nodes)
        self._set_neurons(adapted_on_trial(self.model, found, claimed, calls))
        self._profile = self._slice = self._ranking = None
        self._eliminations = self._statistics = None
        self._stale = False

    def __getstate__(self) -> dict[str, Any]:
        """Everything but torch-pruning's graph, whose nodes hold on to autograd's."""
        return {**vars(self), "DG": None if self.DG is None else "to be traced"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.DG is not None:
            self.DG, _ = self._trace()

    def _trace(self) -> tuple[Any, set[Any]]:
        return trace(
            self.model,
            self._example_inputs,
            ignored_params=self.ignored_params,
            unwrapped_parameters=list(self._unwrapped),
            **self._graph_arguments,
        )

    def _verify(self) -> None:
        """Leave alone, with the reason, the groups whose removal fails on trial."""
        found = verified(
            self.model,
            self.neurons,
            self._example_inputs,
            customized_pruners=self._graph_arguments.get("customized_pruners"),
            forward=self._forward,
            adapters=self.adapters,
        )
        self._set_neurons(found)
        self._slice = None

    def _check_profile(self, profile: Profile) -> None:
        self._set_neurons(self.neurons.without(profile.neurons.left_alone))
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
        self._set_neurons(readable(self.model, self.neurons, self._example_inputs, self._forward))
        return profile_neurons(
            self.model,
            data,
            self.neurons,
            self._example_inputs,
            metrics=(self.metric,),
            categories=categories,
            landscape=self.landscape,
            loss=self.loss,
            keep_readers=bool(self.fold) and self.data is not None and processes() == 1,
            progress=self.progress,
            minimum_samples=minimum_samples,
        )

    def _semantic_importance(self, group: Any) -> Any:
        return self._semantic_ranking()(group)

    def _semantic_ranking(self) -> NSSImportance:
        if self._ranking is None:
            self._ranking = NSSImportance(self.profile)
        return self._ranking

    @property
    def slice(self) -> Slice:
        """The critical neurons: what the next step keeps, or what the last one kept."""
        if self._slice is None:
            self._slice = self._make_slice()
        return self._slice

    def _make_slice(self) -> Slice:
        done = max(self.current_step, 1) / self.iterative_steps
        if self.strategy == "divergence":
            self._foresee()
        elif not self._own_criterion:
            self._semantic_ranking()  # first: the profile says which neurons can be ranked
        if self._budgets:
            return self._slice_by_budget(done)
        return limited(self._slice_wanted(done), self._limits(), self._scores)

    def _slice_wanted(self, done: float) -> Slice:
        """The slice of θ or of the ratio, before limits; ``done`` is the share of all steps."""
        if self._by_theta:
            return self._own_groups(self.profile.slice(1 - (1 - self.theta) * done))
        if self.strategy == "semantic":
            return self._slice_by_ranking()
        assert self._share is not None
        # The profile is of the model as the last step left it; the share is of the first one.
        left = 1 - self._share * (done - 1 / self.iterative_steps)
        ratio = (1 - self._share * done) / left
        assert self.strategy != "divergence"
        return self._own_groups(self.profile.slice(ratio=ratio, strategy=self.strategy))

    def _own_groups(self, critical: Slice) -> Slice:
        """Without the groups of a given profile that are left alone here."""
        kept = {group.name: critical.kept[group.name] for group in self.neurons.groups}
        return Slice(kept, self.neurons.groups)

    def _slice_by_budget(self, done: float) -> Slice:
        ((kind, budget),) = self._budgets.items()
        share = self._share_of(kind)
        wanted = 1 - (1 - budget) * done
        groups, limits = self.neurons.groups, self._limits()
        if self._eliminations is None:
            critical, reached = solve(groups, self._scores, wanted, share, limits)
        else:
            critical, reached = allocate(groups, self._eliminations, wanted, share, limits)
        self._shortfall = _shortfall(kind, wanted, reached)
        return critical

    def _share_of(self, kind: str) -> ShareOf:
        """What a slice keeps of that cost of the model before its first step."""
        groups = self.neurons.groups
        if kind == "parameters":
            return parameter_share(groups, self.model, int(self._whole))
        if kind == "MACs":
            return mac_share(
                groups, self.model, int(self._whole), self._example_inputs, self._forward
            )
        latency = Latency(
            groups, self.model, self._example_inputs, self._remove_from, self._forward
        )
        self._whole = self._whole or latency.whole
        return lambda critical: latency.seconds(critical) / self._whole

    def _foresee(self) -> None:
        """Eliminate the neurons of every group, and see what the readers read, in one pass.

        A second one, where the data can be iterated again, measures what that costs.
        """
        if self._eliminations is not None:
            return
        assert self.data is not None
        self._set_neurons(readable(self.model, self.neurons, self._example_inputs, self._forward))
        groups = self.neurons.groups
        sums = ConsumerSums(self.model, groups, views_of(self.data)) if self.fold else None
        self._eliminations = eliminations(
            self.model, self.data, groups, reads=sums, progress=self.progress
        )
        if sums is not None:
            self._statistics = sums.surveyed(self._example_inputs)
        if not isinstance(self.data, Iterator):
            self._eliminations = measured(
                self.model, self.data, groups, self._eliminations, self._statistics,
                progress=self.progress,
            )  # fmt: skip

    def _limits(self) -> Limits:
        least = {
            name: math.ceil(size * (1 - self.max_pruning_ratio) - 1e-9)
            for name, size in self._sizes.items()
        }
        for group in self.neurons.groups:
            least[group.name] = max(least[group.name], least_neurons(group, self.model))
        heads = (group.name for group in self.neurons.groups if not group.has_channels)
        return Limits(least, self.round_to or 1, frozenset(heads))

    def _scores(self, layer: str) -> torch.Tensor:
        """Importance of the neurons of a layer."""
        if self._own_criterion:
            module = self.model.get_submodule(layer)
            function = self.DG.get_pruner_of_module(module).prune_out_channels
            known = {group.name: group for group in self.neurons.groups}[layer]
            channels = list(range(known.size * known.ties))
            scores = self.importance(self.DG.get_pruning_group(module, function, channels))
            if scores is None:
                return torch.zeros(known.size)
            by_channel: torch.Tensor = scores.detach().cpu()
            return by_channel.view(known.ties, known.size).mean(0)
        return self._semantic_ranking().scores[layer]

    def _slice_by_ranking(self) -> Slice:
        """What torch-pruning's own ranking keeps, read off without pruning anything."""
        kept = {
            group.name: torch.ones(group.size, dtype=torch.bool) for group in self.neurons.groups
        }
        ranked = {group.name for group in self.neurons.groups if group.has_channels}
        with self._ranking_only():
            for group in self._prune():
                name = self.DG._module2name[group[0].dep.target.module]
                if name in ranked:
                    channels = torch.as_tensor(group[0].idxs, dtype=torch.long)
                    kept[name][channels % len(kept[name])] = False
            for name in self._vanished({name: kept[name] for name in ranked}):
                kept[name] = self._scores(name) >= self._scores(name).max()
            if self.prune_num_heads:
                kept.update(self._heads_kept())
        return Slice(kept, self.neurons.groups)

    def _heads_kept(self) -> dict[str, torch.Tensor]:
        """Heads by head_pruning_ratio: of each layer, or of all together with global_pruning."""
        heads = [group for group in self.neurons.groups if not group.has_channels]
        scores = {group.name: self._head_scores(group) for group in heads}
        gone = {}
        for group in heads:
            ratio = self.get_target_head_pruning_ratio(self.model.get_submodule(group.name))
            gone[group.name] = group.size - int(self._sizes[group.name] * (1 - ratio) + 1e-9)
        if self.global_pruning and heads:
            pooled = torch.cat(list(scores.values()))
            out = torch.zeros(len(pooled), dtype=torch.bool)
            out[pooled.argsort(stable=True)[: sum(gone.values())]] = True
            parts = out.split([group.size for group in heads])
            gone = {group.name: int(part.sum()) for group, part in zip(heads, parts, strict=True)}
        kept = {}
        for group in heads:
            most = min(gone[group.name], group.size - 1)
            kept[group.name] = torch.ones(group.size, dtype=torch.bool)
            kept[group.name][scores[group.name].argsort(stable=True)[:most]] = False
        return kept

    def _head_scores(self, group: NeuronGroup) -> torch.Tensor:
        """Importance of the heads; torch-pruning's criteria are averaged over their channels."""
        if not self._own_criterion:
            return self._semantic_ranking().scores[group.name]
        module = self.model.get_submodule(group.name)
        function = self.DG.get_pruner_of_module(module).prune_out_channels
        root = next(member for member in group.members if member.name == group.name)
        found = self.importance(
            self.DG.get_pruning_group(module, function, list(range(root.width)))
        )
        if found is None or len(found) != root.width:
            return torch.zeros(group.size)
        by_channel = found.detach().cpu()[root.channels]
        total = torch.zeros(group.size).index_add(0, root.neurons, by_channel.float())
        return total / torch.bincount(root.neurons, minlength=group.size)

    @contextlib.contextmanager
    def _ranking_only(self) -> Iterator[None]:
        """As torch-pruning needs it to rank for the next step, without its own limits.

        It forgets the one and rounds some layers to nothing with the other: :func:`limited`
        applies them afterwards.
        """
        before = self.current_step, self.round_to, self.max_pruning_ratio
        self.current_step = max(self.current_step, 1)
        self.round_to, self.max_pruning_ratio = None, 1.0
        try:
            yield
        finally:
            self.current_step, self.round_to, self.max_pruning_ratio = before

    def _vanished(self, kept: Mapping[str, torch.Tensor]) -> list[str]:
        """Layers that would lose all neurons, which torch-pruning then skips without a word."""
        untouched = [name for name, mask in kept.items() if mask.all()]
        if not self.global_pruning:
            modules = {name: self.model.get_submodule(name) for name in untouched}
            return [
                name
                for name, module in modules.items()
                if int(self._sizes[name] * (1 - self.get_target_pruning_ratio(module))) == 0
            ]
        pruned = [self._scores(name)[~mask].max() for name, mask in kept.items() if not mask.all()]
        threshold = max(pruned, default=torch.tensor(-math.inf))
        return [name for name in untouched if self._scores(name).max() <= threshold]

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Remove the neurons of this step.

        Args:
            interactive: Yield torch-pruning groups instead, each with the neurons to remove, for
                the caller to ``.prune()``. Nothing is checked, folded, recalibrated, balanced or
                undone then.

        Raises:
            DataError, NumericalError: The data cannot be used.
            GraphError: ``interactive``, and the model could only be traced in parts.
            RemovalError: The smaller model would not work. In every case the model is as before.
        """
        if self.current_step >= self.iterative_steps:
            warnings.warn(
                f"all {self.iterative_steps} step(s) are done, nothing was pruned; make a new "
                "pruner, or pass iterative_steps=",
                stacklevel=2,
            )
            return iter(()) if interactive else None
        if interactive and self.DG is None:
            raise GraphError(
                "interactive=True needs torch-pruning's graph of the whole model, which could not "
                f"be built: {self._untraceable}; call step() without it"
            )
        self.current_step += 1
        try:
            self._refresh()
            if interactive:
                self._verify()
                return self._groups(self.slice)
            before = meta_copy(self.model)
            critical = self._removed()
        except BaseException:
            self.current_step -= 1
            raise
        self._stale = True
        if isinstance(self.wrapper, DistributedDataParallel):
            wrap_again(self.wrapper)
        for group in critical.groups:
            if not group.has_channels:  # scripts set the attributes of attention from this
                module = self.model.get_submodule(group.name)
                self.num_heads[module] = int(critical.kept[group.name].sum())
        rows = report_rows(self.model, critical, self.neurons)
        self._report = _Counted(rows, before, meta_copy(self.model), self._notes())
        return None

    @property
    def report(self) -> Report | None:
        """What the last step did, or None; its costs are counted when it is first read."""
        if isinstance(self._report, _Counted):
            counted = self._report
            before, after = (
                measure(model, self._example_inputs, self._forward)
                for model in (counted.before, counted.after)
            )
            self._report = Report(counted.rows, before, after, counted.notes)
        return self._report

    def _removed(self) -> Slice:
        """The slice that is all that is left of the model.

        Where its removal fails, the groups to blame are left alone.
        """
        try:
            return self._remove(self.slice)
        except RemovalError:
            known = len(self.neurons.groups)
            self._verify()
            if len(self.neurons.groups) == known:
                raise
            return self._remove(self.slice)

    def _remove(self, critical: Slice) -> Slice:
        norms = self._norm_statistics()
        self._see_classes()
        with undone_on_error(self.model):
            self._folded = self._fold(critical)
            self._remove_from(self.model, critical)
            if norms:
                assert self.data is not None
                kept = kept_statistics(norms, critical)
                recalibrate(self.model, self.data, whole=kept, progress=self.progress)
            if self._class_shares is not None:
                assert self.data is not None
                self._balanced = balance_classes(
                    self.model, self.data, self._class_shares, progress=self.progress
                )
        return critical

    def _remove_from(self, model: nn.Module, critical: Slice) -> None:
        """Remove all outside a slice from the model or a copy of it."""
        remove(
            model,
            critical,
            self._example_inputs,
            customized_pruners=self._graph_arguments.get("customized_pruners"),
            forward=self._forward,
            adapters=self.adapters,
        )

    def _norm_statistics(self) -> dict[str, NormStatistics]:
        """What the BatchNorms read before the removal, where that is to be compared."""
        if not self.recalibrate:
            return {}
        assert self.data is not None
        return norm_statistics(self.model, self.data, progress=self.progress)

    def _see_classes(self) -> None:
        """What the model gives each class before the first removal, where that is to be kept."""
        if self.balance and self._class_shares is None:
            assert self.data is not None
            self._class_shares = class_shares(self.model, self.data, progress=self.progress)

    def _fold(self, critical: Slice) -> Folded | None:
        """Fold the neurons outside the slice into their readers, where that is wanted."""
        if self.fold == "refit":
            assert self.data is not None
            return refit(self.model, critical, self.data, progress=self.progress)
        statistics = self._reader_statistics() if self.fold else None
        if statistics is not None:
            return fold_into_readers(self.model, critical, statistics)
        return Folded(("nothing was folded: there is no data",), {}) if self.fold else None

    @property
    def folded(self) -> tuple[str, ...]:
        """The readers whose weights the last step changed beyond the removal."""
        return () if self._folded is None else tuple(self._folded.errors)

    def _reader_statistics(self) -> Mapping[str, ConsumerStatistics] | None:
        """What the readers read, from the profile's own pass where there was one."""
        if self._statistics is not None:
            return self._statistics
        if self._profile is not None:
            return self._profile.readers
        if self.data is None:
            return None
        return consumer_statistics(
            self.model, self.data, self.neurons.groups, progress=self.progress
        )

    def _groups(self, critical: Slice) -> Iterator[Any]:
        self._stale = True
        ties = {group.name: group.ties for group in self.neurons.groups if group.has_channels}
        for name, neurons in critical.removed.items():
            if name not in ties:  # torch-pruning would take heads apart
                continue
            module = self.model.get_submodule(name)
            function = self.DG.get_pruner_of_module(module).prune_out_channels
            tied = [neurons + len(critical.kept[name]) * tie for tie in range(ties[name])]
            yield self.DG.get_pruning_group(module, function, torch.cat(tied).tolist())

    def _cost_with_budget(self) -> float:
        """What the budget is a share of; 0 where there is none, or it is still to be timed."""
        if "MACs" in self._budgets:
            return macs_by_module(self.model, self._example_inputs, self._forward)[""]
        counts = "parameters" in self._budgets
        return sum(p.numel() for p in self.model.parameters()) if counts else 0

    def _notes(self) -> tuple[str, ...]:
        profiled = () if self._profile is None else self._profile.notes
        folded = () if self._folded is None else self._folded.notes
        plain = self.recalibrate and not running_norms(self.model)
        norms = ("nothing was recalibrated: the model has no BatchNorm",) if plain else ()
        balanced = (self._balanced.note,) if self._balanced and self._balanced.note else ()
        return (*self.neurons.notes, *self._shortfall, *profiled, *folded, *norms, *balanced)

    def _forward(self, model: nn.Module, inputs: Any) -> Any:
        return (
            call_model(model, inputs)
            if self._forward_fn is None
            else self._forward_fn(model, inputs)
        )


def _shortfall(kind: str, wanted: float, reached: float) -> tuple[str, ...]:
    """What the report says about a budget that is not met, in zero or one lines."""
    if abs(reached - wanted) <= TOLERANCE:
        return ()
    why = (
        "all neurons that may go are gone; those of the layers left alone, the limits and the "
        "rest of the model take more"
        if reached > wanted
        else "one more neuron, or the next multiple of round_to, would go beyond it"
    )
    return (f"{reached:.1%} of the {kind} are kept, the budget is {wanted:.1%}: {why}",)


def untraceable(model: nn.Module, error: Exception) -> GraphError:
    """torch-pruning's error in our words."""
    return GraphError(
        f"torch-pruning could not trace {type(model).__name__}: {error}; check that "
        "model(*example_inputs) runs"
    )
