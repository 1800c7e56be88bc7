"""NSSPruner: the drop-in pruner, as the list of its stages."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch_pruning as tp
from torch import nn

from nss_prune.errors import GraphError, RemovalError
from nss_prune.pruner.arguments import (
    check_steps,
    check_timeout,
    find_aim,
    is_uniform,
    own_arguments,
    set_without_graph,
    unwrapped,
)
from nss_prune.pruner.assembly import (
    chosen_strategy,
    is_by_profile,
    observed,
    repairs_for,
    strategy_for,
)
from nss_prune.pruner.execution import carry_out
from nss_prune.pruner.interactive import count_heads, history, pruning_groups
from nss_prune.pruner.observation import evidence_of, profiling_for
from nss_prune.pruner.planning import Plan, Planner
from nss_prune.pruner.report import Report, report_of
from nss_prune.pruner.state import restored_on_error, share_history, trace_graph, without_graph
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.tracer import TIMEOUT, Tracer
from nss_prune.pruner.types import (
    ADAPTERS,
    Adapter,
    Categories,
    Contribution,
    Cost,
    Features,
    Importance,
    Loss,
    NamedStrategy,
    NeuronMap,
    Profile,
    Ranked,
    Repair,
    Slice,
    Strategy,
)


class NSSPruner(tp.pruner.BasePruner):  # type: ignore[misc]
    """Semantic slicing with the interface of torch-pruning's pruners.

    With nothing but ``theta``, a step removes every neuron outside the semantic slice at θ. With
    ``pruning_ratio``, that share of each layer's neurons goes instead, in the order of the
    semantic importance (of all layers together with ``global_pruning=True``). With a budget, the
    model keeps that share of its cost. With ``importance``, torch-pruning's own criterion ranks
    the neurons, by a ratio (0.5 unless given) or within a budget.

    Where torch-pruning cannot follow the model as a whole, its parts are pruned one by one. Groups
    of neurons whose removal does not work are found on trial and left alone; the report names
    them with the reason.

    Args:
        model: The model, pruned in place by :meth:`step`. DataParallel and
            DistributedDataParallel are unwrapped, and the latter wraps the smaller model again; its
            processes must be given the same profile, or all their shards of the data.
        example_inputs: Inputs of one call: a tensor, a tuple of arguments or a dict.
        importance: A torch-pruning importance that replaces semantic slicing. With a budget each
            layer keeps the same share, or one threshold serves all with ``global_pruning=True``.
        data: Batches of (inputs, labels) on the model's device; the example inputs by default,
            with the predictions as categories. :class:`nss_prune.Views` makes more of few samples.
        theta: Similarity threshold in (0, 1], 0.95 by default. Over several ``iterative_steps`` it
            falls from 1 in equal steps, and each step profiles the model anew, so ``data`` must be
            an iterable that can be run through again.
        pruning_ratio: Share of the neurons to remove, in [0, 1).
        macs_budget: Share of the multiply-accumulates of one call to keep, in (0, 1].
        params_budget: Share of the parameters to keep, in (0, 1]. The report says so where a
            budget cannot be met within 1 %.
        latency_budget: Share of the seconds of one call to keep, in (0, 1], as predicted from
            timing the model at four widths (see :mod:`nss_prune.allocation.latency`): best on an
            idle machine, with ``round_to`` and the batch size that count, in one process.
        budget: Share of ``cost`` to keep, in (0, 1].
        cost: A cost of your own, see :class:`nss_prune.pruner.cost.Cost`.
        metric: Contribution metric, by name or as an object.
        strategy: "semantic", the paper's rule: one θ for all layers. With ``pruning_ratio`` also
            "category" or "global": the best of each category and their union, or the best over all
            data, of every layer. With a budget also "divergence": as many neurons of each layer
            as make the outputs diverge least for the cost that they save, after folding (see
            :mod:`nss_prune.allocation.divergence`); the default for a budget with ``data``, unless
            a ``profile``, a ``loss`` or an ``importance`` is given. Or an object of your own, see
            :class:`nss_prune.pruner.strategy.Strategy`.
        categories, features, loss, ranking, outputs: See :func:`nss_prune.profile`.
        fold: Fold the removed neurons into their consumers (see
            :mod:`nss_prune.compensation.folding`), from ``data`` or from a ``profile`` that kept
            their inputs' statistics. False is the paper's plain removal. "refit" also makes up for
            what earlier layers changed, at the price of a pass over ``data`` for every consumer.
        recalibrate: Move the running statistics of BatchNorms by as much as those of ``data``
            moved (see :mod:`nss_prune.compensation.recalibration`), in two forward passes.
        balance: Shift the class scores so that each class keeps its mean predicted probability
            (see :mod:`nss_prune.compensation.balance`), in two forward passes. These three, but
            for ``fold=True``, need a list or a DataLoader, and one process.
        repairs: Further ones of your own, see :class:`nss_prune.pruner.repair.Repair`.
        profile: A profile of this model, instead of ``data``.
        timeout: Seconds that torch-pruning may take to follow the model, and its parts.
        adapters: The structures in which neurons are more than channels, such as heads; see
            :mod:`nss_prune.structures` for one of your own.
        progress: Show a progress bar; by default when stderr is a terminal.
        **torch_pruning_arguments: As ``torch_pruning.pruner.BasePruner`` takes them.
            ``ignored_layers`` may hold modules, types and names; the layers that make the
            model's output are left alone without being named. Attention is pruned by whole heads
            (``prune_num_heads`` with a ratio), never inside them.

    Attributes:
        report: What the last step did, or None.
        folded: Consumers whose weights the last step changed beyond the removal.

    Raises:
        ArgumentError: An argument is outside what it may be, or has no effect beside the others.
        GraphError, NothingToPruneError: From tracing the model.
    """

    DG: Any
    current_step: int
    iterative_steps: int
    ignored_layers: list[nn.Module]
    num_heads: dict[nn.Module, int]
    report: Report | None = None
    folded: tuple[str, ...] = ()
    _plan: Plan | None = None
    _whole: float | None = None
    _stale = False

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Importance | None = None,
        *,
        data: Iterable[Any] | None = None,
        theta: float | None = None,
        pruning_ratio: float | None = None,
        macs_budget: float | None = None,
        params_budget: float | None = None,
        latency_budget: float | None = None,
        budget: float | None = None,
        cost: Cost | None = None,
        metric: str | Contribution = "taylor",
        strategy: NamedStrategy | Strategy[Any] | None = None,
        categories: Categories = "labels",
        features: Features = "pixel",
        ranking: Ranked = "magnitude",
        loss: Loss | None = None,
        outputs: Any = None,
        fold: bool | Literal["refit"] = True,
        recalibrate: bool = False,
        balance: bool = False,
        repairs: Sequence[Repair] = (),
        profile: Profile | None = None,
        timeout: float = TIMEOUT,
        adapters: Sequence[Adapter] = ADAPTERS,
        progress: bool | None = None,
        **torch_pruning_arguments: Any,
    ) -> None:
        kept = (params_budget, macs_budget, latency_budget)
        aim = find_aim(theta, pruning_ratio, kept, budget, cost, importance)
        plain = profile is not None or loss is not None
        self.theta = aim.theta
        self.strategy = chosen_strategy(strategy, aim, importance, data, plain)
        self.repairs = repairs_for(data, fold, recalibrate, balance, repairs, outputs, progress)
        common = {"outputs": outputs, "progress": progress}
        own = {"loss": loss, **common}
        self._profiling = profiling_for(data, fold, metric, categories, features, ranking, own)
        model, self.wrapper = unwrapped(model)
        settings = own_arguments(model, torch_pruning_arguments, aim)
        needs_graph = self.strategy == "semantic" and (aim.ratio is not None or bool(importance))
        tracer = Tracer.of(example_inputs, settings, adapters, check_timeout(timeout), needs_graph)
        self._subject = self._first_subject(model, importance, tracer, settings)
        sizes = {group.name: group.size for group in self._subject.groups}
        self._strategy = strategy_for(
            self.strategy, aim, importance, self._profiling, self, sizes, **common
        )
        limits = (self.max_pruning_ratio, self.round_to)
        self._planner = Planner(self._strategy, aim, sizes, *limits, is_uniform(settings))
        self._given = None if profile is None else evidence_of(profile, self._subject)
        check_steps(self.iterative_steps, importance, data, profile)
        self._profiled: Any = self._given
        self._evidence: Any = None
        self._history: list[Any] = []
        share_history(self)

    def _first_subject(
        self,
        model: nn.Module,
        importance: Importance | None,
        tracer: Tracer,
        settings: dict[str, Any],
    ) -> Subject:
        """From torch-pruning's constructor; the model is left as found."""
        chosen = importance or self._semantic_importance

        def build(recorder: Any) -> Any:
            own = {**settings, "output_transform": recorder, "forward_fn": tracer.forward_fn}
            super(NSSPruner, self).__init__(model, tracer.arguments, chosen, **own)
            return self.DG

        subject = tracer.first(model, build)
        if subject.graph is None:
            set_without_graph(self, model, chosen, settings)
        return subject

    def _semantic_importance(self, group: Any) -> Any:
        return evidence_of(self.profile, self._subject).importance(group)

    def __getstate__(self) -> dict[str, Any]:
        return without_graph(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        trace_graph(self)

    @property
    def neurons(self) -> NeuronMap:
        """The neurons of the next step, or of the last one once it is taken."""
        return self._subject.neurons

    @property
    def profile(self) -> Profile:
        """The profile of the model, made on first use, and anew for every further step."""
        if self._profiled is None:
            by_profile = is_by_profile(self._strategy)
            self._profiled = self.evidence if by_profile else self._profiling.observe(self._subject)
        profile: Profile = self._profiled.profile
        return profile

    @property
    def evidence(self) -> Any:
        """What the strategy observed, made on first use, and anew for every further step."""
        if self._evidence is None:
            self._evidence = observed(self._strategy, self._subject, self._given)
        return self._evidence

    @property
    def slice(self) -> Slice:
        """The critical neurons: what the next step keeps, or what the last one kept."""
        if self._plan is None:
            self._plan = self._planned(self._subject.on(self.evidence.neurons))
        return self._plan.slice

    def _planned(self, subject: Subject) -> Plan:
        step = max(self.current_step, 1)
        return self._planner.plan(subject, self.evidence, step, self.iterative_steps, self._whole)

    def step(self, interactive: bool = False) -> Iterator[Any] | None:
        """Remove the neurons of this step.

        Args:
            interactive: Yield torch-pruning groups instead, each with the neurons to remove, for
                the caller to ``.prune()``. Nothing is folded, recalibrated, balanced or undone
                then.

        Raises:
            DataError, NumericalError: The data cannot be used.
            GraphError: ``interactive``, and the model could only be traced in parts.
            RemovalError: The smaller model would not work. In every case model and pruner are as
                before.
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
                f"be built: {self._subject.untraceable}; call step() without it"
            )
        with restored_on_error(self):
            self.current_step += 1
            self._renew()
            if interactive:
                return self._groups(self._verified())
            before = self._subject.cost()
            plan, repaired = self._pruned()
            self._finish(plan)
        self.folded = repaired.changed
        self.report = report_of(plan, before, repaired.notes)
        return None

    def _renew(self) -> None:
        """Trace the model again after an earlier step, and forget what was observed of it."""
        if not self._stale:
            return
        self._subject = self._subject.fresh()
        self.DG = self._subject.graph
        share_history(self)
        self._given = self._profiled = self._evidence = self._plan = None
        self._stale = False

    def _pruned(self) -> tuple[Plan, Any]:
        """Carry the plan out; where that fails, the groups to blame are left alone."""
        plan = self._plan or self._planned(self._subject.on(self.evidence.neurons))
        try:
            return plan, carry_out(plan, self.repairs, self.wrapper)
        except RemovalError:
            verified = self._verified()
            if len(verified.subject.groups) == len(plan.subject.groups):
                raise
            return verified, carry_out(verified, self.repairs, self.wrapper)

    def _verified(self) -> Plan:
        """The plan without the groups whose removal fails on trial."""
        return self._planned(self._subject.on(self.evidence.neurons).verified())

    def _finish(self, plan: Plan) -> None:
        """Keep what was done, and let what is around the model follow."""
        self._plan, self._subject, self._whole = plan, plan.subject, plan.whole
        self._stale = True
        self._history += map(list, history(plan.slice))
        count_heads(self.num_heads, self.model, plan.slice)

    def _groups(self, plan: Plan) -> Iterator[Any]:
        """torch-pruning's groups of a plan, one by one."""
        self._plan, self._subject, self._whole = plan, plan.subject, plan.whole

        def groups() -> Iterator[Any]:
            self._stale = True
            yield from pruning_groups(plan.subject, plan.slice, self.num_heads)

        return groups()

    def pruning_history(self) -> list[Any]:
        """What all steps removed, for ``load_pruning_history`` on a fresh model."""
        return list(self._history)
