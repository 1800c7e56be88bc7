"""What a training step costs where a part of the model is frozen."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.common import models
from benchmarks.common.timing import Rows, in_turn, ratio_row, show
from nss_prune import Slice, profile
from nss_prune.adaptation import Freezing, train_critical, train_others

STEPS = 5  # that are timed together
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: models.mlp(784, 512, 256, 10), (128, 1, 28, 28)),
    "vgg16": (models.vgg16_bn, (64, 3, 32, 32)),
    "resnet18": (torchvision.models.resnet18, (8, 3, 224, 224)),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224"), (8, 3, 224, 224)),
}
PARTS: dict[str, Callable[[Slice, nn.Module], Freezing]] = {
    "critical": train_critical,
    "others": train_others,
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-4),
}

COMBINATIONS = (
    *((part, optimizer, False) for part in PARTS for optimizer in OPTIMIZERS),
    ("critical", "AdamW", True),
)


def freezing(repeats: int) -> Rows:
    """Half of the neurons of every layer are critical; these train, or the others do.

    Gradients of what is frozen stay, as the trainers leave them for these optimisers. In a row of
    its own they are zeroed, as by default in a loop of one's own, where something may read them.
    """
    rows: Rows = []
    for name, (build, shape) in CASES.items():
        torch.manual_seed(0)
        model, inputs = build().eval(), torch.randn(shape)
        labels = torch.arange(len(inputs)) % 10
        critical = half_of(model, inputs[:10], labels[:10])
        for part, title, zeroed in COMBINATIONS:
            frozen, whole = copy.deepcopy(model).train(), copy.deepcopy(model).train()
            ours, theirs = (OPTIMIZERS[title](m.parameters()) for m in (frozen, whole))
            with PARTS[part](critical, frozen).attach(ours, zero_gradients=zeroed):
                times = in_turn(
                    functools.partial(steps, frozen, ours, inputs, labels),
                    functools.partial(steps, whole, theirs, inputs, labels),
                    repeats,
                )
            what = f"{name}, {part} train, {title}" + ", gradients zeroed" * zeroed
            rows.append(ratio_row(what, *times, "<= 1.1", faster=False))
            show(rows[-1])
    return rows


def half_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Slice:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so few samples tell little of which neurons they are
        return profile(model, [(inputs, labels)], progress=False).slice(ratio=0.5)


def steps(model: nn.Module, optimizer: Optimizer, inputs: Tensor, labels: Tensor) -> None:
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
