"""Tasks, how they are learned, and the training of what a freezing lets train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.data import Data, Split
from benchmarks.common.training import (
    Recipe,
    fast,
    make_optimiser,
    suitable_layout,
    suitable_threads,
    take,
)
from benchmarks.rivals.hat import HardAttention
from nss_prune.adaptation import Freezing
from nss_prune.adaptation.datasets import mixed
from nss_prune.adaptation.training import Objective

CLASSES = 10
PROFILED = 1000  # samples of each class, where a setting's slices are computed from fewer

Competition = Literal["method", "task", "all"]


@dataclass(frozen=True)
class Subtask:
    """Some of the classes, and the data of these alone."""

    classes: tuple[int, ...]
    data: Data


@dataclass(frozen=True)
class Course:
    """How a task is learned, the same for all methods.

    loss: whether the outputs of a sample's task compete in the loss, or those of all tasks, or
        what suits the method.
    profiled: samples of each class that slices are computed from.
    """

    recipe: Recipe
    seed: int
    loss: Competition = "method"
    profiled: int = PROFILED

    def again(self, share: float) -> Recipe:
        """The recipe for a share of its epochs."""
        return replace(self.recipe, epochs=int(share * self.recipe.epochs))


class Batches:
    """Batches of a split in random order, another one in each pass, augmented if asked to."""

    def __init__(self, split: Split, size: int, augment: bool, random: torch.Generator) -> None:
        self.split = split
        self.size = size
        self.augment = augment
        self.random = random

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.split), generator=self.random)
        for indices in order.split(self.size):
            yield take(self.split, indices, self.augment, self.random)


class InOrder:
    """Batches of a split in order, as often as asked."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.split.batches(250)


def study(
    freezing: Freezing,
    own: Split,
    replayed: Split | None,
    objective: Objective,
    recipe: Recipe,
    seed: int,
    attention: HardAttention | None = None,
) -> None:
    """Train what a freezing lets train; each epoch passes over all of `own` and `replayed`.

    attention: whose gates train as well, and are asked for their penalty.
    """
    model, steps = freezing.model, recipe.epochs * -(-len(own) // recipe.batch)
    if steps == 0:
        return
    random = torch.Generator().manual_seed(seed)
    data = Batches(own, recipe.batch, recipe.augment, random)
    again = None
    if replayed is not None:
        size = max(1, round(recipe.batch * len(replayed) / len(own)))
        again = Batches(replayed, size, recipe.augment, random)
    optimiser = make_optimiser(model.parameters(), recipe)
    if attention is not None:
        gates = list(attention.embeddings.values())
        optimiser.add_param_group({"params": gates, "weight_decay": 0.0})
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, steps)
    model.train()
    with (
        torch.random.fork_rng(),
        suitable_threads(model),
        suitable_layout(model),
        freezing.attach(optimiser),
        tqdm(total=steps, desc="next task", leave=False, disable=None) as bar,
    ):
        torch.manual_seed(seed)  # for dropout
        for _ in range(recipe.epochs):
            for inputs, labels, count in mixed(data, again):
                with fast(model):
                    outputs = model(inputs)
                loss = objective(outputs.float(), labels, count)
                if attention is not None:
                    loss = loss + attention.penalty()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                if attention is not None:
                    attention.advance()
                bar.update()
    model.eval()


def drawn(split: Split, share: float, seed: int) -> Split:
    """A random share of a split, at least one sample."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    chosen = order[: max(1, round(share * len(split)))]
    return split.subset(chosen.to(split.labels.device))
