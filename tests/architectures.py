"""Random networks of many parts, the same for the same seed, and smaller ones of the same fault.

::

    python -m pytest tests/test_architectures.py                      # 50 of them
    NSS_PRUNE_ARCHITECTURES=2000 python -m pytest tests/test_architectures.py
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import parts
from parts import CLASSES

ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, lambda: nn.ReLU(inplace=True),
)  # fmt: skip
SAMPLES = 104  # of the data
EXAMPLES = ("random", "random", "zeros", "ones", "small")

Made = tuple[list[nn.Module], int]
"""Modules, and how many channels come out of them."""


@dataclass
class Architecture:
    """A network, how to call it, and how to prune it.

    Attributes:
        seed: Makes the same again.
        model: In evaluation mode, with random weights and statistics.
        shape: Of one sample.
        inputs: How many tensors it takes.
        options: Of the pruner, beside data.
        parts: What it is made of.
        dtype: Of parameters and inputs.
        values: What the example inputs are, one of ``EXAMPLES``.
        without: Parts that the network of this seed has, and this one not.
    """

    seed: int
    model: nn.Module
    shape: tuple[int, ...]
    inputs: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)
    dtype: torch.dtype = torch.float64
    values: str = "random"
    without: Collection[int] = ()

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self.options.items())
        about = f"{self.inputs} inputs of {self.dtype}, example {self.values}"
        left = f" without {sorted(self.without)}" if self.without else ""
        return f"seed {self.seed}{left}: {' '.join(self.parts)}; {about}; {given}"

    def example(self) -> Any:
        """Inputs of a call for two samples."""
        made = self.random(2)
        columns = made if isinstance(made, tuple) else (made,)
        change: dict[str, Callable[[Tensor], Tensor]] = {
            "random": lambda column: column,
            "zeros": torch.zeros_like,
            "ones": torch.ones_like,
            "small": lambda column: column * 1e-3,
        }
        found = tuple(change[self.values](column) for column in columns)
        return found if self.inputs > 1 else found[0]

    def random(self, samples: int, seed: int = 0) -> Any:
        """Random inputs of a call."""
        generator = torch.Generator().manual_seed(seed)
        made = [
            torch.randn(samples, *self.shape, generator=generator, dtype=torch.float64)
            for _ in range(self.inputs)
        ]
        found = tuple(column.to(self.dtype) for column in made)
        return found[0] if self.inputs == 1 else found

    def data(self, size: int = 26) -> list[Any]:
        """104 samples with their classes, in batches."""
        inputs = self.random(SAMPLES, seed=self.seed + 1)
        columns = inputs if isinstance(inputs, tuple) else (inputs,)
        batches = zip(*(column.split(size) for column in columns), strict=True)
        labels = (torch.arange(SAMPLES) % CLASSES).split(size)
        return [
            (batch if self.inputs > 1 else batch[0], label)
            for batch, label in zip(batches, labels, strict=True)
        ]


def architecture(seed: int, without: Collection[int] = ()) -> Architecture:
    """The network of a seed.

    Args:
        without: Numbers of parts to leave out; the others stay as they are.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    family = draw.choice((_maps, _maps, _maps, _tokens, _tokens, _vectors, _other_maps))
    inputs, heads = draw.choice((1, 1, 1, 2)), draw.choice((1, 1, 1, 2))
    dtype = draw.choice((torch.float64, torch.float64, torch.float32, torch.bfloat16))
    values, gates, named = draw.choice(EXAMPLES), draw.random() < 0.5, draw.random() < 0.15
    chosen = _options(draw)
    draws = [random.Random(f"{seed} {number}") for number in range(draw.randrange(1, 5))]
    drawn = [part for number, part in enumerate(draws) if number not in without]
    names: list[str] = []
    body, shape, width = family(draw, drawn, names)
    model = parts.Outputs(body, width, heads, gates, named)
    if dtype == torch.bfloat16 and any(map(_lacks_bfloat16, model.modules())):
        dtype = torch.float32
    _randomise(model.to(dtype))
    names.append(f"{heads} {'named ' if named else ''}out")
    return Architecture(
        seed, model.eval(), shape, inputs, chosen, names, dtype, values, sorted(without)
    )


def _lacks_bfloat16(module: nn.Module) -> bool:
    """Whether torch has no kernel for it on a CPU, so that the network would not run."""
    return isinstance(module, nn.LocalResponseNorm)


def shrunk(seed: int, fails: Callable[[Architecture], bool]) -> Architecture:
    """The network of a seed without the parts that its failure does not need."""
    smallest, without = architecture(seed), set[int]()
    for number in range(4):
        found = architecture(seed, without | {number})
        if len(found.parts) < len(smallest.parts) and fails(found):
            without.add(number)
            smallest = architecture(seed, without)
    return smallest


def _options(draw: random.Random) -> dict[str, Any]:
    kept = draw.choice((0.5, 0.7, 0.8))
    chosen: dict[str, Any] = draw.choice(
        (
            {"macs_budget": kept},
            {"params_budget": kept},
            {"theta": kept, "metric": draw.choice(("taylor", "var"))},
            {"pruning_ratio": 1 - kept},
            {"pruning_ratio": 1 - kept, "strategy": "global"},
        )
    )
    if draw.random() < 0.15:
        chosen["round_to"] = 2
    return {**chosen, "outputs": "classes", "fold": False, "progress": False, "timeout": 20.0}


def _randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                if module.running_mean is not None:
                    module.running_mean.normal_(0, 0.3)
                    module.running_var.uniform_(0.5, 1.5)


def _activation(draw: random.Random) -> nn.Module:
    return draw.choice(ACTIVATIONS)()


VECTORS = (
    "linear", "residual", "concat", "gated", "norm", "twice", "branching", "tied", "one weight",
    "einsum", "in place", "swapped", "glu",
)  # fmt: skip


def _vectors(
    draw: random.Random, drawn: list[random.Random], names: list[str]
) -> tuple[nn.Module, tuple[int, ...], int]:
    width = draw.randrange(5, 12)
    shape, layers = (width,), []
    for part in drawn:
        names.append(part.choice(VECTORS))
        made, width = _vector(part, names[-1], width)
        layers += [*made, _activation(part)]
    layers += [nn.Linear(width, 9), nn.ReLU()]
    return nn.Sequential(*layers), shape, 9


def _vector(draw: random.Random, kind: str, width: int) -> Made:
    after = draw.randrange(6, 20)
    norms = (nn.LayerNorm, nn.BatchNorm1d, parts.HandWritten, nn.RMSNorm, lambda _: parts.Unit(-1))
    other = draw.randrange(3, 8)
    wide, inner = nn.Linear(width, after), nn.Linear(after, width)
    same: dict[str, Callable[[], nn.Module]] = {
        "residual": lambda: parts.Residual(nn.Sequential(wide, _activation(draw), inner)),
        "norm": lambda: draw.choice(norms)(width),
        "twice": lambda: parts.Twice(nn.Linear(width, width)),
        "tied": lambda: parts.Tied(width, after),
        "one weight": lambda: parts.OneWeight(width),
    }
    if kind in same:
        return [same[kind]()], width
    if kind == "concat":
        return [parts.Concat([wide, nn.Linear(width, other)], -1)], after + other
    if kind == "swapped":
        layer = nn.Linear(width, after + other)
        return [parts.Swapped(layer, (after, other), -1)], after + other
    changing: dict[str, Callable[[], nn.Module]] = {
        "gated": lambda: parts.Gated(nn.Linear(width, 2 * after), -1),
        "glu": lambda: nn.Sequential(nn.Linear(width, 2 * after), nn.GLU(-1)),
        "branching": lambda: parts.Branching(wide),
        "einsum": lambda: parts.Einsum(width, after),
        "in place": lambda: parts.InPlace(wide),
        "linear": lambda: nn.Linear(width, after, bias=draw.random() < 0.7),
    }
    return [changing[kind]()], after


TOKENS = (
    "attention", "attention", "mha", "grouped queries", "mlp", "gated", "swiglu", "recurrent",
    "encoder", "einsum",
)  # fmt: skip


def _tokens(
    draw: random.Random, drawn: list[random.Random], names: list[str]
) -> tuple[nn.Module, tuple[int, ...], int]:
    heads = draw.choice((2, 3, 4))
    width = heads * draw.choice((4, 6))
    layers: list[nn.Module] = [nn.Linear(6, width)]
    for part in drawn:
        names.append(part.choice(TOKENS))
        layers.append(_token(part, names[-1], width, heads))
    layers += [parts.Mean((1,)), nn.Linear(width, 9), nn.ReLU()]
    return nn.Sequential(*layers), (draw.randrange(3, 6), 6), 9


def _token(draw: random.Random, kind: str, width: int, heads: int) -> nn.Module:
    inner = draw.randrange(8, 20)
    if kind == "encoder":
        return nn.TransformerEncoderLayer(
            width, heads, inner, dropout=0.0, batch_first=True, norm_first=draw.random() < 0.5
        )
    if kind == "recurrent":
        return _recurrent(draw, width)
    bodies: dict[str, Callable[[], nn.Module]] = {
        "attention": lambda: parts.Attention(width, heads, draw.random() < 0.5),
        "mha": lambda: parts.SelfAttention(nn.MultiheadAttention(width, heads, batch_first=True)),
        "grouped queries": lambda: parts.GroupedQueries(width, heads, 2 if heads != 3 else 3),
        "gated": lambda: nn.Sequential(
            parts.Gated(nn.Linear(width, 2 * inner), -1), nn.Linear(inner, width)
        ),
        "swiglu": lambda: parts.GatedUnits(width, inner),
        "einsum": lambda: nn.Sequential(
            parts.Einsum(width, inner), _activation(draw), nn.Linear(inner, width)
        ),
        "mlp": lambda: nn.Sequential(
            nn.Linear(width, inner), _activation(draw), nn.Linear(inner, width)
        ),
    }
    norm = draw.choice((nn.LayerNorm, nn.RMSNorm, parts.HandWritten))(width)
    return parts.Residual(nn.Sequential(norm, bodies[kind]()))


def _recurrent(draw: random.Random, width: int) -> nn.Module:
    kind, both = draw.choice((nn.LSTM, nn.GRU, nn.RNN)), draw.random() < 0.3
    hidden = width // 2 if both else width
    return parts.Recurrent(kind, width, hidden, draw.choice((1, 1, 2)), both)


MAPS = (
    "conv", "residual", "concat", "grouped", "depthwise", "shuffle", "excited", "norm", "gated",
    "transposed", "twice", "in place", "swapped", "branching", "channels last", "as tokens",
    "pixel shuffle",
)  # fmt: skip


def _maps(
    draw: random.Random, drawn: list[random.Random], names: list[str]
) -> tuple[nn.Module, tuple[int, ...], int]:
    width = draw.choice((6, 8, 12))
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for part in drawn:
        names.append(part.choice(MAPS))
        made, width = _map(part, names[-1], width)
        layers += [*made, _activation(part)]
        if part.random() < 0.2:
            layers.append(part.choice((nn.MaxPool2d, nn.AvgPool2d))(3, 1, 1))
    flat = draw.random() < 0.4
    names.append("flatten" if flat else "pool")
    pooled = draw.choice((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d))(2)
    pool = [pooled, nn.Flatten()] if flat else [parts.Mean((2, 3))]
    layers += [*pool, nn.Linear(width * (4 if flat else 1), 9), nn.ReLU()]
    return nn.Sequential(*layers), (3, 6, 6), 9


def _map(draw: random.Random, kind: str, width: int) -> Made:
    after = draw.choice((4, 6, 8, 10, 12))
    norms = (
        nn.BatchNorm2d, lambda size: nn.GroupNorm(2, size), lambda size: nn.GroupNorm(1, size),
        nn.InstanceNorm2d, parts.ChannelNorm, lambda _: parts.Unit(1),
        lambda _: nn.LocalResponseNorm(3),
    )  # fmt: skip
    same: dict[str, Callable[[], nn.Module]] = {
        "residual": lambda: parts.Residual(_bottleneck(draw, width, after)),
        "shuffle": parts.Shuffled,
        "excited": lambda: parts.Excited(width, after),
        "norm": lambda: draw.choice(norms)(width),
        "twice": lambda: parts.Twice(nn.Conv2d(width, width, 3, padding=1)),
        "channels last": lambda: parts.ChannelsLast(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, after), nn.Linear(after, width))
        ),
        "as tokens": lambda: parts.AsTokens(parts.Residual(parts.Attention(width, 2, True))),
    }
    if kind in same:
        return [same[kind]()], width
    if kind == "concat":
        branches = [nn.Conv2d(width, after, 1), nn.Conv2d(width, 4, 3, padding=1)]
        return [parts.Concat(branches, 1)], after + 4
    if kind == "swapped":
        return [parts.Swapped(nn.Conv2d(width, after + 4, 1), (after, 4), 1)], after + 4
    if kind == "grouped":
        return [nn.Conv2d(width, 2 * after, 3, padding=1, groups=2)], 2 * after
    changing: dict[str, Callable[[], list[nn.Module]]] = {
        "depthwise": lambda: [
            nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, after, 1)
        ],
        "gated": lambda: [parts.Gated(nn.Conv2d(width, 2 * after, 1), 1)],
        "transposed": lambda: [nn.ConvTranspose2d(width, after, 3, padding=1)],
        "in place": lambda: [parts.InPlace(nn.Conv2d(width, after, 1))],
        "branching": lambda: [parts.Branching(nn.Conv2d(width, after, 1))],
        "pixel shuffle": lambda: [
            nn.Conv2d(width, 4 * after, 1), nn.PixelShuffle(2), nn.MaxPool2d(2)
        ],
        "conv": lambda: [
            nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)
        ],
    }  # fmt: skip
    return changing[kind](), after


def _bottleneck(draw: random.Random, width: int, inner: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, inner, 1),
        nn.BatchNorm2d(inner),
        _activation(draw),
        nn.Conv2d(inner, width, 3, padding=1),
    )


def _other_maps(
    draw: random.Random, drawn: list[random.Random], names: list[str]
) -> tuple[nn.Module, tuple[int, ...], int]:
    axes = draw.choice((1, 3))
    convolution, transposed, norm = {
        1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
        3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
    }[axes]
    width, layers = 6, [convolution(3, 6, 3, padding=1)]
    for part in drawn:
        after, kind = (
            part.choice((4, 6, 8)),
            part.choice(("conv", "depthwise", "transposed", "residual")),
        )
        names.append(f"{axes}-D {kind}")
        if kind == "residual":
            layers.append(parts.Residual(convolution(width, width, 3, padding=1)))
            after = width
        elif kind == "depthwise":
            layers += [
                convolution(width, width, 3, padding=1, groups=width),
                convolution(width, after, 1),
            ]
        else:
            layers.append(
                (convolution if kind == "conv" else transposed)(width, after, 3, padding=1)
            )
        layers += [norm(after), _activation(part)]
        width = after
    layers += [parts.Mean(tuple(range(2, 2 + axes))), nn.Linear(width, 9), nn.ReLU()]
    return nn.Sequential(*layers), (3, *(4,) * axes), 9
