"""What torch-pruning's criteria say of the neurons, and what its pruners would remove."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nss_prune.errors import ArgumentError
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.pruner.followed import of_followed
from nss_prune.pruner.member_groups import group_of_members
from nss_prune.pruner.strategy import Importance
from nss_prune.pruner.subject import Subject


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


class Asked:
    """An importance that is asked once for each group, in case it draws or costs much."""

    def __init__(self, importance: Importance) -> None:
        self._importance = importance
        self._answers: dict[Any, Any] = {}

    def __call__(self, group: Any) -> Any:
        """The importance of a torch-pruning group's channels, ``[channels]``, or None."""
        root, channels = group[0].dep, tuple(group[0].idxs)
        key = (root.target.module, root.handler, channels)
        if key not in self._answers:
            self._answers[key] = self._checked(group)
        return self._answers[key]

    def _checked(self, group: Any) -> Any:
        """The importance of a group, where it is a number for each channel, or None."""
        found = self._importance(group)
        if found is None:
            return None
        name, width = type(self._importance).__name__, len(group[0].idxs)
        neurons = max(group[0].root_idxs, default=0) + 1  # of several channels each, perhaps
        least, most = min(width, neurons), max(width, neurons)
        is_vector = isinstance(found, Tensor) and found.dim() == 1
        if not is_vector or not least <= len(found) <= most:
            raise ArgumentError(
                f"importance={name} gives {_told(found)} for a group of {width} channels; it must "
                "give a tensor with a number for each channel, or None"
            )
        if bool(found.isnan().any()):
            raise ArgumentError(
                f"importance={name} gives NaN for {int(found.isnan().sum())} of {width} channels, "
                "which cannot be ranked; look for NaN in the weights and their gradients"
            )
        return found


def importance_of(subject: Subject, group: NeuronGroup, importance: Importance) -> Tensor | None:
    """What a criterion says of the neurons of a group, ``[neurons]``, or None.

    A neuron of several channels gets their mean.
    """
    module = subject.model.get_submodule(group.name)
    if group.followed or module not in subject.graph.module2node:
        return of_followed(subject.model, group, importance)
    root = next((member for member in group.members if member.name == group.name), None)
    width = group.size * group.ties if group.has_channels or root is None else root.width
    if group.is_uneven:
        found = importance(group_of_members(subject, group))
    else:
        function = subject.graph.get_pruner_of_module(module).prune_out_channels
        found = importance(subject.graph.get_pruning_group(module, function, list(range(width))))
    if found is None or len(found) != width:
        return None
    by_channel: Tensor = found.detach().cpu()
    if group.has_channels or root is None:
        return by_channel.view(group.ties, group.size).mean(0)
    by_channel = by_channel[root.channels]
    total = torch.zeros(group.size).index_add(0, root.neurons, by_channel.float())
    return total / torch.bincount(root.neurons, minlength=group.size)


def _is_ranked(subject: Subject, group: NeuronGroup) -> bool:
    """Whether torch-pruning ranks what we take for neurons.

    Of the halves of a gated unit it ranks each channel, and takes its partner along.
    """
    if not group.has_channels or group.followed:
        return False
    layers = dict(subject.model.named_modules())
    return group.ties == 1 or any(
        getattr(layers.get(member.name), name, 1) > 1
        for member in group.members
        for name in ("groups", "num_groups")
    )


class Ranking:
    """torch-pruning's own ranking for the next step, read off without pruning anything.

    Args:
        pruner: Of torch-pruning: its ratios, scopes and numbers of heads decide.
        first_sizes: Layer -> neurons before the first step.
    """

    def __init__(self, pruner: Any, first_sizes: Mapping[str, int]) -> None:
        self._pruner = pruner
        self._first_sizes = first_sizes

    def slice(
        self, subject: Subject, importance: Importance, scores: Callable[[str], Tensor]
    ) -> Slice:
        """What it keeps.

        Args:
            importance: Of torch-pruning's groups.
            scores: Layer -> importance of its neurons, ``[neurons]``.
        """
        kept = {group.name: torch.ones(group.size, dtype=torch.bool) for group in subject.groups}
        ranked = {group.name for group in subject.groups if _is_ranked(subject, group)}
        with self._next_step(subject, importance):
            for group in self._pruner._prune():
                name = subject.graph._module2name[group[0].dep.target.module]
                if name in ranked:
                    channels = torch.as_tensor(group[0].idxs, dtype=torch.long)
                    kept[name][channels % len(kept[name])] = False
            for name in self._vanished(subject, {name: kept[name] for name in ranked}, scores):
                left = max(1, int(self._first_sizes[name] * (1 - self._ratio(subject, name))))
                best = scores(name).argsort(descending=True, stable=True)[:left]
                kept[name] = torch.zeros_like(kept[name]).index_fill(0, best, True)
            by_scores = {g.name for g in subject.groups if g.followed or g.has_channels} - ranked
            share = {name: kept[name] for name in ranked}
            kept.update(self._followed(subject, by_scores, share, scores))
            if self._pruner.prune_num_heads:
                kept.update(self._heads(subject, scores))
        return Slice(kept, subject.groups)

    @contextlib.contextmanager
    def _next_step(self, subject: Subject, importance: Importance) -> Iterator[None]:
        """The pruner as it ranks for the next step, without limits of its own.

        It forgets the largest ratio, and rounds some layers to nothing:
        :func:`nss_prune.allocation.budget.limited` applies both afterwards. Heads are not ranked
        among the channels, inside of which nothing can go.
        """
        own = vars(self._pruner)
        apart = [group for group in subject.groups if not group.has_channels]
        makers = [member.name for group in apart for member in group.makers]
        followed = [g.name for g in subject.groups if g.has_channels and not _is_ranked(subject, g)]
        followed += [group.name for group in subject.groups if group.followed]
        names = {*subject.neurons.left_alone, *makers, *followed}
        left_alone = [subject.model.get_submodule(name) for name in names]
        changed = {
            "estimate_importance": importance,
            "current_step": max(self._pruner.current_step, 1),
            "round_to": None,
            "max_pruning_ratio": 1.0,
            "ignored_layers": [*self._pruner.ignored_layers, *left_alone],
            "num_heads": dict(self._pruner.num_heads),
            "out_channel_groups": dict(self._pruner.out_channel_groups),
        }
        before = {name: own[name] for name in changed if name in own}
        own.update(changed)
        try:
            yield
        finally:
            for name in changed:
                own.pop(name)
            own.update(before)

    def _followed(
        self,
        subject: Subject,
        names: Collection[str],
        kept: Mapping[str, Tensor],
        scores: Callable[[str], Tensor],
    ) -> dict[str, Tensor]:
        """Neurons that torch-pruning does not describe, or not as blocks, by its ratios.

        With ``global_pruning`` what scores no more than the best that goes elsewhere goes as well;
        where nothing goes elsewhere, they are ranked among themselves.
        """
        found = {group.name: scores(group.name) for group in subject.groups if group.name in names}
        if not found:
            return {}
        gone = [scores(name)[~mask].max() for name, mask in kept.items() if not mask.all()]
        pooled = torch.cat(list(found.values())).sort().values
        most = max(gone) if gone else pooled[int(len(pooled) * self._pruner.pruning_ratio) - 1]
        chosen = {}
        for name, its in found.items():
            left = max(1, int(self._first_sizes[name] * (1 - self._ratio(subject, name))))
            if self._pruner.global_pruning:
                left = max(1, int((its > most).sum()))
            best = its.argsort(descending=True, stable=True)[:left]
            chosen[name] = torch.zeros(len(its), dtype=torch.bool).index_fill(0, best, True)
        return chosen

    def _vanished(
        self, subject: Subject, kept: Mapping[str, Tensor], scores: Callable[[str], Tensor]
    ) -> list[str]:
        """Layers that would lose all neurons, which torch-pruning then skips without a word.

        They keep the share that the ratio leaves of all.
        """
        untouched = [name for name, mask in kept.items() if mask.all()]
        if not self._pruner.global_pruning:
            ratios = {name: self._ratio(subject, name) for name in untouched}
            return [
                name
                for name, ratio in ratios.items()
                if int(self._first_sizes[name] * (1 - ratio)) == 0
            ]
        pruned = [scores(name)[~mask].max() for name, mask in kept.items() if not mask.all()]
        threshold = max(pruned, default=torch.tensor(-math.inf))
        return [name for name in untouched if scores(name).max() <= threshold]

    def _ratio(self, subject: Subject, name: str) -> float:
        ratio: float = self._pruner.get_target_pruning_ratio(subject.model.get_submodule(name))
        return ratio

    def _heads(self, subject: Subject, scores: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Heads by head_pruning_ratio: of each layer, or of all together with global_pruning."""
        heads = [group for group in subject.groups if not group.has_channels and not group.followed]
        by_layer = {group.name: scores(group.name) for group in heads}
        gone = {}
        for group in heads:
            module = subject.model.get_submodule(group.name)
            ratio = self._pruner.get_target_head_pruning_ratio(module)
            left = int(self._first_sizes[group.name] * (1 - ratio) + 1e-9)
            gone[group.name] = group.size - left
        if self._pruner.global_pruning and heads:
            pooled = torch.cat(list(by_layer.values()))
            out = torch.zeros(len(pooled), dtype=torch.bool)
            out[pooled.argsort(stable=True)[: sum(gone.values())]] = True
            parts = out.split([group.size for group in heads])
            gone = {group.name: int(part.sum()) for group, part in zip(heads, parts, strict=True)}
        kept = {}
        for group in heads:
            most = min(gone[group.name], group.size - 1)
            kept[group.name] = torch.ones(group.size, dtype=torch.bool)
            kept[group.name][by_layer[group.name].argsort(stable=True)[:most]] = False
        return kept
