"""Small networks whose activations a consumer can compute on paper, and helpers for real ones."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def hand_weighted() -> nn.Sequential:
    """2 inputs, 4 neurons, 2 classes, float64.

    For an input (u, v) not below 0 the neurons emit u, v, u + v and 0: neuron 2 is the sum of
    the first two, and neuron 3 is dead. Class 0 reads u + 2 (u + v), class 1 reads v.
    """
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1], [-1, -1]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 0]]))
        model[2].bias.zero_()
    return model


def mlp(inputs: int = 12, hidden: tuple[int, ...] = (16, 11), classes: int = 3) -> nn.Sequential:
    widths = [inputs, *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes)).double()


def cnn() -> nn.Sequential:
    """Convolutions, a flatten that repeats each neuron, and two fully connected layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(10 * 4 * 4, 14),
        nn.ReLU(),
        nn.Linear(14, 5),
    ).double()


class Residual(nn.Module):
    """A residual stream with a LayerNorm over it, and a concat before the head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 20)
        self.down = nn.Linear(20, width)
        self.side = nn.Linear(6, 7)
        self.head = nn.Linear(width + 7, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.stem(inputs)
        stream = stream + self.down(torch.nn.functional.gelu(self.up(self.norm(stream))))
        side = torch.relu(self.side(inputs))
        return self.head(torch.cat([stream, side], dim=1))


def settled(model: nn.Module, inputs: Tensor) -> nn.Module:
    """Give untrained norms statistics of real data, so that outputs are of ordinary size."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    model.train()
    for _ in range(2):
        with torch.no_grad():
            model(inputs)
    return model.eval()


class Tied(nn.Module):
    """Grouped convolutions and GroupNorm, which tie channels, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.GroupNorm(4, 24)
        self.grouped = nn.Conv2d(24, 36, 3, padding=1, groups=3)
        self.inner = nn.GroupNorm(2, 36)
        self.back = nn.Conv2d(36, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.stem(inputs)
        stream = stream + self.back(self.inner(self.grouped(self.norm(stream).relu())).relu())
        return self.head(stream.mean((2, 3)))


def batches(
    samples: int, shape: tuple[int, ...], classes: int, *, size: int = 16, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Random labelled batches in float64; every class has about as many samples."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, *shape, dtype=torch.float64, generator=generator)
    labels = torch.arange(samples) % classes
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything that must be as before after a failure: tensors by bits, flags, modes, hooks."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "objects": [id(parameter) for parameter in model.parameters()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "widths": [repr(module) for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = fingerprint(model)
    states = before.pop("state"), after.pop("state")
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert after == before


class TiedLanguage(nn.Module):
    """Tokens to scores of the next ones; the embedding and the head are one tensor."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.hidden = nn.Embedding(11, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens.long())
        made: Tensor = self.head(stream + self.hidden(stream).relu())
        return made
