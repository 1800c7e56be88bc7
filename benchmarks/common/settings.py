"""The settings of the benchmarks: the paper's six, and others.

One needs no download, one is the paper's AlexNet at a quarter of its widths, one is pretrained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from benchmarks.common import models
from benchmarks.common.data import Data
from benchmarks.common.training import Recipe
from nss_prune.errors import ArgumentError


@dataclass(frozen=True)
class Setting:
    """One model on one data set.

    rate: share of the remaining weights that one iteration prunes: the r of the paper's Table 4.
    theta: similarity that a slice must reach before unstructured pruning. The paper does not
        give its own; 0.99 is the strictest in its range. By itself it should cost next to nothing
        on the check data, and mlp-fmnist needs a stricter one for that.
    profiled: labelled samples of each category that the slice is computed from.
    """

    name: str
    data: str
    build: Callable[[], nn.Module]
    recipe: Recipe
    rate: float = 0.05
    theta: float = 0.99
    profiled: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.theta <= 1:
            raise ArgumentError(f"theta is {self.theta}; it is a similarity in (0, 1].")
        if self.recipe.epochs < 0:
            raise ArgumentError(f"epochs is {self.recipe.epochs}; it is 0 (untrained) or more.")

    def with_epochs(self, epochs: int | None) -> Setting:
        """This setting, trained for `epochs` epochs; as it is for None."""
        if epochs is None:
            return self
        return replace(self, recipe=replace(self.recipe, epochs=epochs))

    def with_learning_rate(self, rate: float | None) -> Setting:
        """This setting, trained at another learning rate; as it is for None."""
        if rate is None:
            return self
        return replace(self, recipe=replace(self.recipe, learning_rate=rate))

    def with_batch(self, batch: int | None) -> Setting:
        """This setting, trained in batches of `batch` samples; as it is for None.

        The learning rate of SGD grows with the square root of the batch: linearly, it would be too
        high for the first steps at four times the batch.
        """
        if batch is None or batch == self.recipe.batch:
            return self
        if batch < 1:
            raise ArgumentError(f"--batch is {batch}; it is the samples of a step, at least 1.")
        rate = self.recipe.learning_rate
        if self.recipe.optimiser == "sgd":
            rate *= (batch / self.recipe.batch) ** 0.5
        return replace(self, recipe=replace(self.recipe, batch=batch, learning_rate=rate))

    def with_theta(self, theta: float | None) -> Setting:
        """This setting, sliced at `theta`; as it is for None."""
        return self if theta is None else replace(self, theta=theta)


# High learning rates, at which the networks lose no accuracy and become easier to slice.
SMALL_MLP = Recipe(epochs=60, learning_rate=0.02, batch=64)
MLP = Recipe(epochs=10, learning_rate=0.004)
CNN = Recipe(epochs=60, learning_rate=0.1, optimiser="sgd", weight_decay=5e-4, augment=True)
WIDE_CNN = replace(CNN, learning_rate=0.05)
SHORT_CNN = replace(WIDE_CNN, epochs=8)
SMALL_SET_CNN = replace(WIDE_CNN, epochs=150)
PRETRAINED = Recipe(epochs=0, learning_rate=0.01, optimiser="sgd")

SIMILAR = 0.99  # from which DeepArc counts a layer as redundant, as in the paper
ALL = 10**6  # more samples of a category than there are

REGISTERED = (
    Setting(
        "mlp-digits",
        "digits",
        partial(models.mlp, 64, 128, 64, 10),
        SMALL_MLP,
        rate=0.10,
        profiled=ALL,
    ),
    Setting(
        "mlp-mnist", "mnist", partial(models.mlp, 784, 512, 256, 10), MLP, rate=0.10, profiled=ALL
    ),
    Setting(
        "mlp-fmnist",
        "fmnist",
        partial(models.mlp, 784, 512, 256, 10),
        MLP,
        theta=0.995,
        profiled=ALL,
    ),
    Setting("alexnet-cifar10", "cifar10", models.alexnet_cifar10, WIDE_CNN),
    Setting(
        "alexnet-quarter-cifar10",
        "cifar10",
        partial(models.alexnet_cifar10, narrower=4),
        SHORT_CNN,
    ),
    Setting("vgg16-cifar10", "cifar10", models.vgg16_bn, CNN),
    Setting("resnet101-cifar10", "cifar10", models.resnet101_cifar, CNN),
    Setting("vgg19-imagenet10", "imagenet10", models.vgg19_bn, SMALL_SET_CNN),
    Setting(
        "efficientnet-imagenet",
        "imagenet",
        models.pretrained_efficientnet_lite0,
        PRETRAINED,
        profiled=ALL,
    ),
)

SETTINGS = {setting.name: setting for setting in REGISTERED}

# Not the paper's: for the accuracy board alone.
VIT = Recipe(epochs=60, learning_rate=1e-3, label_smoothing=0.1, augment=True)
SHORT_VIT = replace(VIT, epochs=10)
STEM_VIT = replace(VIT, epochs=40)
BEYOND = (
    Setting("resnet20-cifar10", "cifar10", models.resnet20_cifar, CNN),
    Setting("vgg16-quarter-cifar10", "cifar10", partial(models.vgg16_bn, narrower=4), SHORT_CNN),
    Setting("vit-cifar10", "cifar10", models.vit_cifar, VIT),
    Setting(
        "vit-small-cifar10",
        "cifar10",
        partial(models.vit_cifar, width=64, depth=4, heads=4),
        SHORT_VIT,
    ),
    Setting("vit-stem-cifar10", "cifar10", models.vit_stem_cifar, STEM_VIT),
)


def chosen(names: str) -> list[Setting]:
    """The settings that a comma-separated list names ("all": every one)."""
    wanted = list(SETTINGS) if names == "all" else names.split(",")
    for name in wanted:
        if name not in SETTINGS:
            raise ArgumentError(f"There is no setting {name!r}; there are: {', '.join(SETTINGS)}.")
    return [SETTINGS[name] for name in wanted]


def profiled_batches(setting: Setting, data: Data) -> list[tuple[Tensor, Tensor]]:
    """The labelled batches that a setting's models are profiled with."""
    return list(data.train.per_category(setting.profiled).batches(500))
