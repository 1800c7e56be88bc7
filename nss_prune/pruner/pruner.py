"""NSSPruner: the drop-in pruner, as the list of its stages."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from nss_prune.core.thread_state import outside_inference_mode
from nss_prune.pruner.arguments import (
    WithoutRegularizer,
    as_called,
    by_position,
    check_steps,
    check_timeout,
    find_aim,
    is_uniform,
    own_arguments,
    set_without_graph,
    unwrapped,
)
from nss_prune.pruner.assembly import Given, chosen_strategy, strategy_for
from nss_prune.pruner.observation import profiling_for
from nss_prune.pruner.planning import Planner
from nss_prune.pruner.profile_evidence import evidence_of
from nss_prune.pruner.repairs import repairs_for
from nss_prune.pruner.steps import Steps
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.tracer import TIMEOUT, Tracer
from nss_prune.pruner.types import (
    ADAPTERS,
    Adapter,
    Categories,
    Contribution,
    CostSpec,
    Features,
    Importance,
    Loss,
    NamedStrategy,
    Profile,
    Ranked,
    Repair,
    Score,
    Strategy,
)
from nss_prune.pruner.upkeep import Upkeep


class NSSPruner(Steps, WithoutRegularizer):
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
            DistributedDataParallel are unwrapped, and the latter wraps the smaller model again; of
            a compiled model that inside is pruned, and compiled anew when it is called.
            All processes of torch.distributed give their shards of the data, and get the same.
        example_inputs: Inputs of one call: a tensor, a tuple of arguments or a dict; or a list of
            pictures, where the model takes one.
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
            budget cannot be met within 1 %. Of several budgets all hold.
        latency_budget: Share of the seconds of one call to keep, in (0, 1], as predicted from
            timing the model at four widths (see :mod:`nss_prune.allocation.latency`): best on an
            idle machine, with ``round_to`` and the batch size that count.
        budget: Share of ``cost`` to keep, in (0, 1].
        cost: "macs", "parameters", "latency", a function of the slice that is kept, or an object,
            see :class:`nss_prune.pruner.cost.Cost`.
        max_divergence: In place of a budget: the smallest model by ``cost`` ("macs" by default)
            whose outputs are predicted to diverge by at most this, in nats a sample.
        score: Function of a model, larger for better, measured on held-out batches of yours; see
            :func:`nss_prune.accuracy_on`. The smallest model with ``min_score``, or whose score is
            at most ``max_drop`` less than the whole model's: about seven models are measured.
        classes: Prune for these classes alone, two at least: by the samples with their labels,
            and for their outputs, in this order. The head loses its other rows, unless
            ``keep_head``; with ``interactive`` steps it never does. Where fewer than a hundred
            samples are of these classes, "divergence" is calibrated by all samples.
        metric: Contribution metric, by name or as an object.
        strategy: "semantic", the paper's rule: one θ for all layers. With ``pruning_ratio`` also
            "category" or "global": the best of each category and their union, or the best over all
            data, of every layer. With a budget also "divergence": as many neurons of each layer
            as make the outputs diverge least for the cost that they save, after folding (see
            :mod:`nss_prune.allocation.divergence`); the default for a budget, unless
            a ``profile``, a ``loss`` or an ``importance`` is given. Or an object of your own, see
            :class:`nss_prune.pruner.strategy.Strategy`.
        categories, features, loss, ranking, outputs: See :func:`nss_prune.profile`.
        fold: Fold the removed neurons into their consumers (see
            :mod:`nss_prune.compensation.folding`), from ``data`` or from a ``profile`` that kept
            their inputs' statistics. False is the paper's plain removal. "refit" also makes up for
            what earlier layers changed, at the price of a pass over ``data`` for every consumer.
        recalibrate: Move the running statistics of BatchNorms by as much as those of ``data``
            moved (see :mod:`nss_prune.compensation.recalibration`), in two forward passes. By
            default where that is known to help: for a ``macs_budget`` of 0.7 or less, with folding
            and 500 samples or more; the report says so.
        balance: Shift the class scores so that each class keeps its mean predicted probability
            (see :mod:`nss_prune.compensation.balance`), in two forward passes. These three, but
            for ``fold=True``, need a list or a DataLoader.
        repairs: Further ones of your own, see :class:`nss_prune.pruner.repair.Repair`.
        profile: A profile of this model, instead of ``data``.
        timeout: Seconds of CPU time that torch-pruning may take to follow the model and its parts.
        adapters: The structures in which neurons are more than channels, such as heads; see
            :mod:`nss_prune.structures` for one of your own.
        progress: Show a progress bar; by default when stderr is a terminal.
        memory_limit: Bytes for the sums of a pass; where all take more there are several passes.
        checkpoint: A folder for the sums of finished passes. A run that was broken off goes on
            from them, with the same model, arguments and data; they go when all steps are done.
        forward_dtype: torch.bfloat16 runs the model in mixed precision in the passes over the
            data, which is faster on most GPUs; sums stay in float32 and float64.
        *positional: torch-pruning's arguments after ``importance``, in its order.
        **torch_pruning_arguments: As ``torch_pruning.pruner.BasePruner`` takes them.
            ``ignored_layers`` may hold modules, types and names; the layers that make the
            model's output are left alone without being named. "divergence" goes inside the heads
            of attention as well, to the same dimensions of all heads of a layer (see
            :mod:`nss_prune.allocation.head_bases`), unless ``prune_head_dims=False``; with
            ``step(interactive=True)`` and all else heads go whole (``prune_num_heads`` and
            ``head_pruning_ratio`` with a ratio).
            ``round_to="auto"``, the default for budgets, keeps multiples of 8 (16 in half
            precision) of layers of 64 channels and more, or of less where the budget would be
            missed; 1 is exact.

    Attributes:
        report: What the last step did, or None; of an interactive step once all groups were taken.
        folded: Consumers whose weights the last step changed beyond the removal.

    Raises:
        ArgumentError: An argument is outside what it may be, or has no effect beside the others.
        GraphError, NothingToPruneError: From tracing the model.
    """

    @outside_inference_mode
    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: Importance | None = None,
        *positional: Any,
        data: Iterable[Any] | None = None,
        theta: float | None = None,
        pruning_ratio: float | None = None,
        macs_budget: float | None = None,
        params_budget: float | None = None,
        latency_budget: float | None = None,
        budget: float | None = None,
        cost: CostSpec | None = None,
        max_divergence: float | None = None,
        score: Score | None = None,
        min_score: float | None = None,
        max_drop: float | None = None,
        classes: Sequence[int] | None = None,
        keep_head: bool = False,
        metric: str | Contribution = "taylor",
        strategy: NamedStrategy | Strategy[Any] | None = None,
        categories: Categories = "labels",
        features: Features = "pixel",
        ranking: Ranked = "magnitude",
        loss: Loss | None = None,
        outputs: Any = None,
        fold: bool | Literal["refit"] = True,
        recalibrate: bool | None = None,
        balance: bool = False,
        repairs: Sequence[Repair] = (),
        profile: Profile | None = None,
        timeout: float = TIMEOUT,
        adapters: Sequence[Adapter] = ADAPTERS,
        progress: bool | None = None,
        memory_limit: float = 2**32,
        checkpoint: str | os.PathLike[str] | None = None,
        forward_dtype: torch.dtype | None = None,
        **torch_pruning_arguments: Any,
    ) -> None:
        given = by_position(positional, torch_pruning_arguments)
        pruning_ratio = given.pop("pruning_ratio", pruning_ratio)
        kept = (params_budget, macs_budget, latency_budget)
        wanted = (max_divergence, score, min_score, max_drop)
        aim = find_aim(theta, pruning_ratio, kept, budget, cost, importance, wanted)
        named = (metric, categories, features, ranking)
        self.strategy = chosen_strategy(strategy, aim, importance, bool(profile or loss), named)
        some = Given.of(self.strategy, classes, keep_head, data, outputs, categories, loss, profile)
        data, outputs = some.data, some.outputs
        upkeep = self._upkeep = Upkeep.of(progress, memory_limit, checkpoint, forward_dtype)
        self.repairs = repairs_for(data, fold, recalibrate, balance, repairs, outputs, upkeep, aim)
        own = {"loss": loss, "outputs": outputs}
        self._profiling = profiling_for(data, bool(fold), *named, own, upkeep)
        model, self.wrapper = unwrapped(model)
        settings = own_arguments(model, given, aim)
        tracing = (example_inputs, settings, adapters, check_timeout(timeout))
        self._subject = self._first_subject(model, importance, aim, *tracing)
        self._arrange(aim, importance, some, settings, outputs)
        check_steps(self.iterative_steps, importance, data, profile, aim)
        self._given = self._profiled = evidence_of(profile, self._subject) if profile else None

    def _arrange(
        self,
        aim: Any,
        importance: Importance | None,
        given: Given,
        settings: dict[str, Any],
        outputs: Any,
    ) -> None:
        """Set the strategy, the repairs and the planner, once the neurons are known."""
        self._begin()
        self.theta = aim.theta
        sizes = self._subject.sizes
        head = given.head(self._subject)
        self.repairs = (*self.repairs, *([head] if head else []))
        self._strategy = strategy_for(
            self.strategy,
            aim,
            importance,
            self._profiling,
            self,
            sizes,
            settings.get("prune_head_dims", True),
            self.repairs,
            outputs,
        )
        limits = (self.max_pruning_ratio, self.round_to)
        self._planner = Planner(self._strategy, aim, sizes, *limits, is_uniform(settings), head)

    def _first_subject(
        self,
        model: nn.Module,
        importance: Importance | None,
        aim: Any,
        example_inputs: Any,
        settings: dict[str, Any],
        adapters: Sequence[Adapter],
        timeout: float,
    ) -> Subject:
        """From torch-pruning's constructor; the model is left as found."""
        needs_graph = self.strategy == "semantic" and (aim.ratio is not None or bool(importance))
        called = as_called(model, example_inputs, settings.get("forward_fn"))
        tracer = Tracer.of(called, settings, adapters, timeout, needs_graph)
        chosen = importance or self._semantic_importance

        def build(recorder: Any, apart: Sequence[nn.Module]) -> Any:
            ignored = [*settings["ignored_layers"], *apart]
            own = {**settings, "output_transform": recorder, "ignored_layers": ignored}
            own["forward_fn"] = recorder.watched(tracer.forward_fn)
            super(NSSPruner, self).__init__(model, tracer.arguments, chosen, **own)
            self.ignored_layers = [layer for layer in self.ignored_layers if layer not in apart]
            return self.DG

        subject = tracer.first(model, build)
        subject = replace(subject, forward_dtype=self._upkeep.forward_dtype)
        if subject.graph is None:
            set_without_graph(self, model, chosen, settings)
        return subject

    def _semantic_importance(self, group: Any) -> Any:
        return evidence_of(self.profile, self._subject).importance(group)
