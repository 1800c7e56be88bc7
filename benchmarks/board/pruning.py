"""Prune a copy of a model through NSSPruner, as a board's criteria and kinds ask for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.board.boards import Board, Level
from benchmarks.board.cells import BY_DIVERGENCE, CORP, DIVERGENCE, SEMANTIC, VBP, Variant
from benchmarks.common.data import Split
from benchmarks.common.training import Recipe, train
from benchmarks.rivals import ranking
from benchmarks.rivals.corp import ActivationEnergy, RidgeCompensation
from benchmarks.rivals.ranked import RankedByInputs
from benchmarks.rivals.vbp import ActivationVariance, MeanShift
from nss_prune import NSSImportance, NSSPruner, Profile, Slice
from nss_prune.allocation.budget import Limits
from nss_prune.errors import NothingToPruneError
from nss_prune.graph.costs import macs_by_module
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.pruner.cost import MACs, everything
from nss_prune.pruner.eliminating import Eliminating
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.strategies import DivergenceStrategy
from nss_prune.pruner.strategy import Strategy, Target
from nss_prune.pruner.subject import Subject
from nss_prune.pruner.upkeep import Upkeep

Batches = Iterable[tuple[Tensor, Tensor]]

HIDDEN_CONSUMERS = "conv_pwl"  # timm's name for what consumes hidden channels
BUDGETS = {"MACs": "macs_budget", "parameters": "params_budget"}
OWN: dict[str, tuple[type[RankedByInputs], Callable[[], Repair]]] = {
    VBP: (ActivationVariance, MeanShift),
    CORP: (ActivationEnergy, RidgeCompensation),
}
"""Criterion -> the strategy that ranks, and the repair that compensates."""


@dataclass(frozen=True)
class Tuning:
    """How models are trained on after they were pruned."""

    split: Split
    recipe: Recipe


class HiddenMACs:
    """The multiply-accumulates of the layers around the neurons that may go."""

    name = "MACs of the hidden channels"

    def of(self, subject: Subject) -> Callable[[Slice], float]:
        """Those of the whole model without what the other layers take."""
        macs = MACs().of(subject)
        others = macs(everything(subject)) - own_macs(subject)
        return lambda critical: macs(critical) - others


def own_macs(subject: Subject) -> int:
    """Multiply-accumulates of one call in the layers that have neurons of the subject's groups."""
    by_module = macs_by_module(subject.model, subject.example_inputs, subject.forward)
    names = {member.name for group in subject.groups for member in group.members}
    return sum(by_module.get(name, 0) for name in names)


def is_hidden(group: NeuronGroup) -> bool:
    """Whether the neurons are the hidden channels of an inverted bottleneck."""
    return any(consumer.name.endswith(HIDDEN_CONSUMERS) for consumer in group.consumers)


class ObservedOnce:
    """A strategy whose passes over the data serve every budget and kind of the same model."""

    def __init__(self, strategy: Strategy[Any]) -> None:
        self._strategy = strategy
        self._evidence: Any = None

    def observe(self, subject: Subject) -> Any:
        """What the strategy observes, when it is first asked."""
        if self._evidence is None:
            self._evidence = self._strategy.observe(subject)
        return self._evidence

    def select(self, subject: Subject, evidence: Any, target: Target, limits: Limits) -> Slice:
        """What the strategy selects."""
        return self._strategy.select(subject, evidence, target, limits)


@dataclass(frozen=True)
class Pruned:
    """A smaller model, and the share of the budget's cost that it keeps."""

    model: nn.Module
    reached: float


@dataclass
class Calibration:
    """A model of a board and the batches that calibrate; what passes find is kept.

    example: inputs of one call.   seed: for what is drawn.   tuning: for kinds that are tuned.
    """

    board: Board
    model: nn.Module
    example: Tensor
    batches: Batches
    seed: int
    tuning: Tuning | None = None

    def prune(self, variant: Variant, level: Level, kind: str) -> Pruned | None:
        """The smaller model of one kind; None where the criterion says nothing of any layer.

        A criterion that draws is the same for all levels and kinds of a seed.
        """
        model, parts = copy.deepcopy(self.model), kind.split("-")
        own: Any = [OWN[variant.criterion][1]()] if "own" in parts else []
        fold: Any = "refit" if "refit" in parts else "folded" in parts
        if variant.criterion in ranking.GRADIENTS:
            ranking.set_gradients(model, self._gradients(variant.criterion))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            try:
                pruner = NSSPruner(
                    model, self.example, data=self.batches, progress=False,
                    recalibrate="recalibrated" in parts, balance="balanced" in parts,
                    fold=fold, repairs=own,
                    **self._criterion(variant, bool(fold)), **self._budget(level),
                )  # fmt: skip
                pruner.step()
            except NothingToPruneError:
                return None
        by_channel(model)
        if "tuned" in parts:
            assert self.tuning is not None
            train(model, self.tuning.split, self.tuning.recipe, seed=0)
        return Pruned(model, self._reached(pruner, level))

    @cached_property
    def profile(self) -> Profile:
        """The semantic profile, which holds the statistics that folding takes as well."""
        pruner = NSSPruner(
            copy.deepcopy(self.model), self.example, data=self.batches, strategy="semantic",
            progress=False, **self._budget(self.board.levels[0]),
        )  # fmt: skip
        return pruner.profile

    def _criterion(self, variant: Variant, folds: bool) -> dict[str, Any]:
        """NSSPruner's arguments that say what ranks the neurons."""
        together = variant.allocation == "global"
        if variant.criterion in BY_DIVERGENCE or variant.criterion in OWN:
            return {"strategy": self._observed_once(variant, folds)}
        if variant.criterion == SEMANTIC and together:
            return {"strategy": "semantic", "profile": self.profile}
        importance = (
            NSSImportance(self.profile)
            if variant.criterion == SEMANTIC
            else ranking.CRITERIA[variant.criterion]()
        )
        return {"importance": importance, "profile": self.profile, "global_pruning": together}

    def _budget(self, level: Level) -> dict[str, Any]:
        """NSSPruner's arguments that say how much is kept."""
        exact = {"round_to": 1}
        if not self.board.hidden:
            return {BUDGETS[level.of]: level.kept, **exact}
        ignored = [group.name for group in self._whole.groups if not is_hidden(group)]
        if level.of == "MACs":
            own = {"budget": level.kept, "cost": HiddenMACs()}
        else:
            own = {BUDGETS[level.of]: level.kept}
        return {**own, "ignored_layers": ignored, **exact}

    def _observed_once(self, variant: Variant, folds: bool) -> ObservedOnce:
        """NSSPruner's default for a budget with data, or the strategy of a rival.

        folds: whether what is removed will be folded, which `divergence` counts on.
        """
        key = (variant, folds and variant.criterion in BY_DIVERGENCE)
        if key not in self._strategies:
            if variant.criterion in BY_DIVERGENCE:
                inside = variant.criterion == DIVERGENCE
                upkeep = Upkeep(progress=False)
                eliminating = Eliminating(self.batches, folds, None, upkeep, inside)
                strategy: Strategy[Any] = DivergenceStrategy(eliminating)
            else:
                ranked, _ = OWN[variant.criterion]
                strategy = ranked(self.batches, together=variant.allocation == "global")
            self._strategies[key] = ObservedOnce(strategy)
        return self._strategies[key]

    def _reached(self, pruner: NSSPruner, level: Level) -> float:
        """The share of the level's cost that is kept, by the report's counts."""
        report = pruner.report
        assert report is not None
        if level.of == "parameters":
            return report.after.parameters / report.before.parameters
        gone = report.before.macs - report.after.macs
        return 1 - gone / (own_macs(self._hidden) if self.board.hidden else report.before.macs)

    @cached_property
    def _whole(self) -> Subject:
        """The model, with all neurons that can go."""
        pruner = NSSPruner(copy.deepcopy(self.model), self.example, params_budget=0.5, fold=False)
        return Subject(self.model, self.example, pruner.neurons)

    @cached_property
    def _hidden(self) -> Subject:
        others = {group.name for group in self._whole.groups if not is_hidden(group)}
        reasons = dict.fromkeys(others, "no hidden channels")
        return replace(self._whole, neurons=self._whole.neurons.without(reasons))

    def _gradients(self, criterion: str) -> dict[str, Tensor]:
        if criterion not in self._known_gradients:
            found = ranking.GRADIENTS[criterion](self.model, self.batches)
            self._known_gradients[criterion] = found
        return self._known_gradients[criterion]

    @cached_property
    def _strategies(self) -> dict[tuple[Variant, bool], ObservedOnce]:
        return {}

    @cached_property
    def _known_gradients(self) -> dict[str, dict[str, Tensor]]:
        return {}


def by_channel(model: nn.Module) -> nn.Module:
    """The model with its channels laid out last: depthwise convolutions take half the time so."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
