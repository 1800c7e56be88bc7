"""The boards that there are: which model, on which data, pruned to which budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.common.settings import BEYOND, SETTINGS, Setting
from benchmarks.common.training import Recipe
from nss_prune.errors import ArgumentError


@dataclass(frozen=True)
class Level:
    """A budget: the share ``kept`` of the "MACs" or the "parameters"."""

    of: str
    kept: float

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise ArgumentError(f"the share kept is {self.kept}; it is in (0, 1].")

    def __str__(self) -> str:
        return f"{self.of} {self.kept:g}"


def levels(of: str, *shares: float) -> tuple[Level, ...]:
    """A level for each share."""
    return tuple(Level(of, share) for share in shares)


@dataclass(frozen=True)
class Board:
    """One model on one data set, and how it is pruned.

    calibrated: pictures that a seed draws.   batch: pictures at a time.
    hidden: prune the hidden channels of inverted bottlenecks alone, to a share of their MACs.
    tuned_epochs: of training after pruning, where that is asked for and there is data for it.
    mirrored: calibrate with the mirror images of the pictures, too.
    models: every seed has a model of its own.
    """

    name: str
    setting: Setting
    calibrated: int
    levels: tuple[Level, ...] = levels("MACs", 0.9, 0.8, 0.7, 0.6, 0.5)
    batch: int = 500
    hidden: bool = False
    tuned_epochs: int = 1
    mirrored: bool = False
    models: bool = False

    @property
    def tuned(self) -> Recipe:
        """How the model is trained on after pruning; for 0 epochs where it is a pretrained one."""
        recipe = self.setting.recipe
        epochs = self.tuned_epochs if recipe.epochs else 0
        return replace(recipe, epochs=epochs, learning_rate=recipe.learning_rate / 10)


CIFAR_CALIBRATED = 2000
IMAGENET = SETTINGS["efficientnet-imagenet"]
REGISTERED = (
    Board("mlp-digits", SETTINGS["mlp-digits"], 500),
    Board(
        "mlp-mnist",
        SETTINGS["mlp-mnist"],
        10_000,
        Board.levels + levels("parameters", 0.3, 0.2, 0.1, 0.07, 0.05),
    ),
    Board("mlp-fmnist", SETTINGS["mlp-fmnist"], 10_000),
    *(
        Board(setting.name, setting, CIFAR_CALIBRATED)
        for setting in (
            SETTINGS["alexnet-cifar10"],
            SETTINGS["alexnet-quarter-cifar10"],
            SETTINGS["vgg16-cifar10"],
            *BEYOND,
        )
    ),
    Board(IMAGENET.name, IMAGENET, 500, levels("MACs", 0.9, 0.8, 0.7, 0.6), 50, hidden=True),
    Board(f"{IMAGENET.name}-whole", IMAGENET, 500, levels("MACs", 0.8, 0.6), 50),
)
BOARDS = {board.name: board for board in REGISTERED}
