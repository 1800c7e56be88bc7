"""A model of RQ3: what is new to it, the attacks, and what each method trains in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.common.data import SOURCES, Data, Split
from benchmarks.common.settings import SIMILAR
from benchmarks.common.training import Recipe
from benchmarks.reports.rq3 import Outcome
from nss_prune import Profile, Slice, profile
from nss_prune.adaptation import FGSM, PGD, Freezing, train_critical
from nss_prune.adaptation.attacks import Attack
from nss_prune.deeparc import DeepArc

SAMPLES = 1000  # new ones, and as many for the attack after the training
TPR = 60.0  # percent
THETAS = (
    *(0.5, 0.6, 0.7, 0.8, 0.85),
    *(round(0.90 + 0.01 * i, 2) for i in range(9)),
    *(round(0.99 + 0.0005 * i, 4) for i in range(20)),
    0.9999,
)

Adversaries = Literal["fixed", "fresh"]
Trained = Literal["all"] | Freezing | float
"""What a method trains; a share of the parameters, which gradients choose, is a float."""


@dataclass(frozen=True)
class Strength:
    """Of both attacks, in units of the range of a pixel."""

    epsilon: float
    step_size: float
    steps: int

    def attack(self, name: str, normalization: tuple[Tensor, Tensor]) -> Attack:
        """The attack "fgsm" or "pgd" on inputs that were normalised by mean and deviation."""
        if name == "fgsm":
            return FGSM(self.epsilon, normalization)
        return PGD(self.epsilon, normalization, step_size=self.step_size, steps=self.steps)


DIGITS = Strength(0.3, 0.01, 40)
PHOTOGRAPHS = Strength(8 / 255, 2 / 255, 10)
STRENGTHS = {"digits": DIGITS, "mnist": DIGITS, "fmnist": DIGITS}


@dataclass(frozen=True)
class Course:
    """How a model learns new samples, the same for all methods.

    tpr: largest share of the parameters that a slice may hold.
    similar: similarity from which DeepArc counts a layer as redundant.
    """

    recipe: Recipe
    adversaries: Adversaries = "fixed"
    tpr: float = TPR / 100
    similar: float = SIMILAR


@dataclass(frozen=True)
class Sliced:
    """The critical neurons, the theta at which they are, and the seconds that it took."""

    critical: Slice
    theta: float
    seconds: float


@dataclass
class Subject:
    """A trained model, which keeps its values, and what there is to train in it.

    profiled: samples of each category of the training data to find that with.
    """

    setting: str
    seed: int
    model: nn.Module
    data: Data
    course: Course
    profiled: int

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return list(self.data.train.per_category(self.profiled).batches(500))

    @cached_property
    def sliced(self) -> Sliced:
        start = time.perf_counter()
        known = profile(self.model, self.batches)
        theta, critical = largest_slice(known, self.model, self.course.tpr)
        return Sliced(critical, theta, time.perf_counter() - start)

    @cached_property
    def layers(self) -> tuple[DeepArc, float]:
        """With the seconds that it took."""
        start = time.perf_counter()
        found = DeepArc(self.model, self.batches, self.course.similar, "unbiased", progress=False)
        return found, time.perf_counter() - start

    def trained_by(self, method: str) -> Trained:
        """What a method trains."""
        if method == "full":
            return "all"
        if method == "sensitive":
            return self.course.tpr
        if method == "deeparc":
            return self.layers[0].freezing()
        if method == "neusemslice":
            return train_critical(self.sliced.critical, self.model)
        return self.layers[0].freezing(self.sliced.critical)

    def described(self, outcome: Outcome) -> Outcome:
        """An outcome with the part that its method trains, and the seconds to find it."""
        if "neusemslice" in outcome.method:
            spent = outcome.prepared + self.sliced.seconds
            outcome = replace(outcome, theta=self.sliced.theta, prepared=spent)
        if "deeparc" in outcome.method:
            layers, seconds = self.layers
            spent = outcome.prepared + seconds
            outcome = replace(outcome, redundant=layers.redundant, prepared=spent)
        return outcome

    def told(self, methods: Sequence[str]) -> str:
        """The parts that the methods train, in words."""
        words = ""
        if any("neusemslice" in method for method in methods):
            words += f", sliced at theta {self.sliced.theta:g}"
        if any("deeparc" in method for method in methods):
            layers, _ = self.layers
            similar = max(layers.similarity.values())
            words += f", redundant layers: {', '.join(layers.redundant) or 'none'}"
            words += f" (similarities up to {similar:.4f})"
        return words


def largest_slice(known: Profile, model: nn.Module, share: float) -> tuple[float, Slice]:
    """The largest theta of the grid whose slice holds at most `share` of the parameters.

    The least theta, if none does. Returns it and its slice.
    """
    for theta in reversed(THETAS):
        critical = known.slice(theta)
        if 1 - critical.compression_rate(model) <= share:
            break
    return theta, critical


def gathered(split: Split, count: int = SAMPLES) -> Split:
    """`count` samples, or all there are: equally many of each category, in a fixed random order."""
    categories = len(split.labels.unique())
    even = split.per_category(-(-count // categories))
    order = torch.randperm(len(even), generator=torch.Generator().manual_seed(0))[:count]
    return even.subset(order.to(even.labels.device))


def new_samples(data: Data, recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    """From the check data; a batch of them and their adversaries is one of the recipe's."""
    return list(gathered(data.check).batches(max(1, recipe.batch // 2)))


def attack_of(name: str, data: Data) -> Attack:
    """An attack of the strength that is usual for the data, in units of the range of a pixel."""
    scale = SOURCES[data.name].scale
    normalization = (data.train.mean / scale, data.train.std / scale)
    return strength_for(data).attack(name, normalization)


def strength_for(data: Data) -> Strength:
    return STRENGTHS.get(data.name, PHOTOGRAPHS)
