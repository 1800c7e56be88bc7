"""Random networks of many parts, the same for the same seed, and what must hold of each.

::

    python -m pytest tests/test_architectures.py                      # 50 of them
    NSS_PRUNE_ARCHITECTURES=2000 python -m pytest tests/test_architectures.py
"""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nss_prune import NSSPruner, Slice, load_pruned, save_pruned
from nss_prune.errors import NSSPruneError
from nss_prune.graph.costs import Cost, measure

CLASSES = 4
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, lambda: nn.ReLU(inplace=True),
)  # fmt: skip


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.body(inputs)


class Concat(nn.Module):
    """Branches side by side; on the axis of the channels."""

    def __init__(self, branches: list[nn.Module], axis: int) -> None:
        super().__init__()
        self.branches, self.axis = nn.ModuleList(branches), axis

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([branch(inputs) for branch in self.branches], dim=self.axis)


class Gated(nn.Module):
    """One half of the channels is multiplied by the sigmoid of the other."""

    def __init__(self, layer: nn.Module, axis: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis

    def forward(self, inputs: Tensor) -> Tensor:
        values, gates = self.layer(inputs).chunk(2, dim=self.axis)
        return values * torch.sigmoid(gates)


class Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        pooled = inputs.mean((2, 3), keepdim=True)
        return inputs * torch.sigmoid(self.up(torch.relu(self.down(pooled))))


class Shuffled(nn.Module):
    """Channels of two groups in turn, as ShuffleNet mixes them."""

    def forward(self, inputs: Tensor) -> Tensor:
        samples, channels, height, width = inputs.shape
        pairs = inputs.view(samples, 2, channels // 2, height, width)
        return pairs.transpose(1, 2).reshape(samples, channels, height, width)


class HandWritten(nn.Module):
    """A norm with a parameter of its own class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        scale = inputs.pow(2).mean(-1, keepdim=True).add(1e-5).rsqrt()
        return inputs * scale * self.weight


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, width // heads, fused
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        samples, tokens, _ = inputs.shape
        parts = self.qkv(inputs).reshape(samples, tokens, 3, self.num_heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        else:
            scores = torch.einsum("bhid,bhjd->bhij", query * self.head_dim**-0.5, key)
            mixed = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), value)
        return self.proj(mixed.transpose(1, 2).reshape(samples, tokens, -1))


class Recurrent(nn.Module):
    def __init__(self, kind: type, width: int, hidden: int) -> None:
        super().__init__()
        self.layer = kind(width, hidden, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs)[0]


class Twice(nn.Module):
    """One module, called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(inputs)))


class Branching(nn.Module):
    """Takes another way by the values that it sees."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        made = self.layer(inputs)
        return made if bool(inputs.sum() > -1e9) else made * 2


class Mean(nn.Module):
    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.axes)


class Outputs(nn.Module):
    """Several outputs, and several inputs that are added."""

    def __init__(self, body: nn.Module, width: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(outputs))
        self.inputs = inputs

    def forward(self, *inputs: Tensor) -> Any:
        features = self.body(sum(inputs))
        found = [head(features) for head in self.heads]
        return found[0] if len(found) == 1 else tuple(found)


@dataclass
class Architecture:
    """A network and how to call it.

    Attributes:
        seed: Makes the same again.
        model: In float64, in evaluation mode, with random weights and statistics.
        shape: Of one sample.
        inputs: How many tensors it takes.
        parts: What it is made of.
    """

    seed: int
    model: nn.Module
    shape: tuple[int, ...]
    inputs: int
    parts: list[str] = field(default_factory=list)

    def example(self, samples: int = 2, seed: int = 0) -> Any:
        """Random inputs of a call."""
        generator = torch.Generator().manual_seed(seed)
        made = [
            torch.randn(samples, *self.shape, generator=generator, dtype=torch.float64)
            for _ in range(self.inputs)
        ]
        return made[0] if self.inputs == 1 else tuple(made)


def architecture(seed: int) -> Architecture:
    """The network of a seed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    family = draw.choice((_maps, _maps, _maps, _tokens, _tokens, _vectors, _other_maps))
    parts: list[str] = []
    body, shape, width = family(draw, parts)
    inputs, outputs = draw.choice((1, 1, 1, 2)), draw.choice((1, 1, 1, 2))
    model = Outputs(body, width, inputs, outputs).double()
    _randomise(model)
    return Architecture(seed, model.eval(), shape, inputs, [*parts, f"{inputs} in {outputs} out"])


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


def _vectors(draw: random.Random, parts: list[str]) -> tuple[nn.Module, tuple[int, ...], int]:
    width = draw.randrange(5, 12)
    shape, layers = (width,), []
    for _ in range(draw.randrange(2, 6)):
        kind = draw.choice(("linear", "residual", "concat", "gated", "norm", "twice", "branching"))
        parts.append(kind)
        after = draw.randrange(6, 20)
        if kind == "residual":
            inner = nn.Sequential(
                nn.Linear(width, after), _activation(draw), nn.Linear(after, width)
            )
            layers.append(Residual(inner))
            continue
        if kind == "norm":
            made = draw.choice((nn.LayerNorm, nn.BatchNorm1d, HandWritten, nn.RMSNorm))
            layers.append(made(width))
            continue
        if kind == "twice":
            layers.append(Twice(nn.Linear(width, width)))
            continue
        if kind == "concat":
            other = draw.randrange(3, 8)
            layers.append(Concat([nn.Linear(width, after), nn.Linear(width, other)], -1))
            after += other
        elif kind == "gated":
            layers.append(Gated(nn.Linear(width, 2 * after), -1))
        elif kind == "branching":
            layers.append(Branching(nn.Linear(width, after)))
        else:
            layers.append(nn.Linear(width, after, bias=draw.random() < 0.7))
        layers.append(_activation(draw))
        width = after
    layers += [nn.Linear(width, 9), nn.ReLU()]
    return nn.Sequential(*layers), shape, 9


def _tokens(draw: random.Random, parts: list[str]) -> tuple[nn.Module, tuple[int, ...], int]:
    heads = draw.choice((2, 3, 4))
    width, inner = heads * draw.choice((3, 4)), draw.randrange(8, 20)
    layers: list[nn.Module] = [nn.Linear(6, width)]
    for _ in range(draw.randrange(1, 4)):
        kind = draw.choice(
            ("attention", "attention", "mha", "mlp", "gated", "recurrent", "encoder")
        )
        parts.append(kind)
        norm = draw.choice((nn.LayerNorm, nn.RMSNorm, HandWritten))(width)
        if kind == "attention":
            body: nn.Module = Attention(width, heads, draw.random() < 0.5)
        elif kind == "mha":
            body = SelfAttention(nn.MultiheadAttention(width, heads, batch_first=True))
        elif kind == "encoder":
            layers.append(
                nn.TransformerEncoderLayer(width, heads, inner, dropout=0.0, batch_first=True)
            )
            continue
        elif kind == "gated":
            body = nn.Sequential(Gated(nn.Linear(width, 2 * inner), -1), nn.Linear(inner, width))
        elif kind == "recurrent":
            layers.append(Recurrent(draw.choice((nn.LSTM, nn.GRU, nn.RNN)), width, width))
            continue
        else:
            body = nn.Sequential(
                nn.Linear(width, inner), _activation(draw), nn.Linear(inner, width)
            )
        layers.append(Residual(nn.Sequential(norm, body)))
    layers += [Mean((1,)), nn.Linear(width, 9), nn.ReLU()]
    return nn.Sequential(*layers), (draw.randrange(3, 6), 6), 9


class SelfAttention(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs, need_weights=False)[0]


def _maps(draw: random.Random, parts: list[str]) -> tuple[nn.Module, tuple[int, ...], int]:
    width = draw.choice((6, 8, 12))
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(draw.randrange(2, 5)):
        kind = draw.choice(
            ("conv", "residual", "concat", "grouped", "depthwise", "shuffle", "excited", "norm",
             "gated", "transposed", "twice")
        )  # fmt: skip
        parts.append(kind)
        after = draw.choice((4, 6, 8, 10, 12))
        if kind == "residual":
            layers.append(Residual(_bottleneck(draw, width, after)))
        elif kind == "concat":
            other = nn.Conv2d(width, 4, 3, padding=1)
            layers.append(Concat([nn.Conv2d(width, after, 1), other], 1))
            width = after + 4
        elif kind == "grouped":
            layers.append(nn.Conv2d(width, 2 * after, 3, padding=1, groups=2))
            width = 2 * after
        elif kind == "depthwise":
            layers += [
                nn.Conv2d(width, width, 3, padding=1, groups=width),
                nn.Conv2d(width, after, 1),
            ]
            width = after
        elif kind == "shuffle":
            layers.append(Shuffled())
        elif kind == "excited":
            layers.append(Excited(width, after))
        elif kind == "norm":
            norms = (nn.BatchNorm2d, lambda size: nn.GroupNorm(2, size), nn.InstanceNorm2d)
            layers.append(draw.choice(norms)(width))
        elif kind == "gated":
            layers.append(Gated(nn.Conv2d(width, 2 * after, 1), 1))
            width = after
        elif kind == "transposed":
            layers.append(nn.ConvTranspose2d(width, after, 3, padding=1))
            width = after
        elif kind == "twice":
            layers.append(Twice(nn.Conv2d(width, width, 3, padding=1)))
        else:
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
            width = after
        layers.append(_activation(draw))
        if draw.random() < 0.2:
            layers.append(draw.choice((nn.MaxPool2d, nn.AvgPool2d))(3, 1, 1))
    flat = draw.random() < 0.4
    parts.append("flatten" if flat else "pool")
    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten()] if flat else [Mean((2, 3))]
    layers += [*pool, nn.Linear(width * (4 if flat else 1), 9), nn.ReLU()]
    return nn.Sequential(*layers), (3, 6, 6), 9


def _bottleneck(draw: random.Random, width: int, inner: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, inner, 1),
        nn.BatchNorm2d(inner),
        _activation(draw),
        nn.Conv2d(inner, width, 3, padding=1),
    )


def _other_maps(draw: random.Random, parts: list[str]) -> tuple[nn.Module, tuple[int, ...], int]:
    axes = draw.choice((1, 3))
    convolution, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 3: (nn.Conv3d, nn.BatchNorm3d)}[axes]
    parts.append(f"{axes}-D")
    width, layers = 3, []
    for _ in range(draw.randrange(2, 4)):
        after = draw.choice((4, 6, 8))
        layers += [convolution(width, after, 3, padding=1), norm(after), _activation(draw)]
        width = after
    layers += [Mean(tuple(range(2, 2 + axes))), nn.Linear(width, 9), nn.ReLU()]
    return nn.Sequential(*layers), (3, *(4,) * axes), 9


class Violation(AssertionError):
    """A property that does not hold."""


def check(found: Architecture) -> str:
    """Try all properties of a network.

    Returns:
        "survived", or "refused: <why>" where nothing of it can be pruned.

    Raises:
        Violation: One does not hold.
        Exception: Anything that is not an error of the library is a fault of it too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {name: value.clone() for name, value in found.model.state_dict().items()}
        original = copy.deepcopy(found.model)
        try:
            before = measure(found.model, found.example())
            pruner = NSSPruner(found.model, found.example(), **_options(found))
            chosen = pruner.slice
            _expect(_same_state(found.model, state), "to choose changed the model")
            pruner.step()
        except NSSPruneError as error:
            _expect(_same_state(found.model, state), "a refusal changed the model")
            return f"refused: {type(error).__name__}: {error}"
        _removed_is_masked(found, original, pruner.slice)
        _order_is_no_matter(found, original, chosen)
        _budget_is_kept(found, before, pruner)
        _backward_works(found)
        _saved_is_loaded(found)
        _prunes_again(found)
    return "survived"


def _options(found: Architecture) -> dict[str, Any]:
    draw = random.Random(found.seed)
    choice = draw.choice(("macs", "params", "theta", "ratio"))
    kept = draw.choice((0.5, 0.7, 0.8))
    chosen: dict[str, Any] = {
        "macs": {"macs_budget": kept},
        "params": {"params_budget": kept},
        "theta": {"theta": kept},
        "ratio": {"pruning_ratio": 1 - kept},
    }[choice]
    return {**chosen, "data": data(found), "outputs": "classes", "fold": False, "progress": False}


def data(found: Architecture, size: int = 26) -> list[Any]:
    """104 samples in batches."""
    inputs = found.example(104, seed=found.seed + 1)
    columns = inputs if isinstance(inputs, tuple) else (inputs,)
    batches = zip(*(column.split(size) for column in columns), strict=True)
    labels = (torch.arange(104) % CLASSES).split(size)
    return [
        (batch if found.inputs > 1 else batch[0], label)
        for batch, label in zip(batches, labels, strict=True)
    ]


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All outputs of a call."""
    with torch.no_grad():
        made = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return list(made) if isinstance(made, tuple) else [made]


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


def _same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[n], v) for n, v in state.items())


def _close(first: list[Tensor], second: list[Tensor], tolerance: float = 1e-9) -> bool:
    return all(
        a.shape == b.shape and bool(((a - b).abs() <= tolerance * (1 + b.abs())).all())
        for a, b in zip(first, second, strict=True)
    )


def _removed_is_masked(found: Architecture, original: nn.Module, critical: Slice) -> None:
    inputs = found.example(3, seed=7)
    with critical.masked(original):
        masked = outputs(original, inputs)
    _expect(_close(outputs(found.model, inputs), masked), "removed is not masked")


def _order_is_no_matter(found: Architecture, original: nn.Module, critical: Slice) -> None:
    options = _options(found)
    if "theta" not in options:
        return
    shuffled = [(inputs, labels) for inputs, labels in reversed(data(found, size=13))]
    pruner = NSSPruner(original, found.example(), **{**options, "data": shuffled})
    same = all(torch.equal(pruner.slice.kept[name], kept) for name, kept in critical.kept.items())
    _expect(same, "the order of samples and the size of batches change the slice")


def _budget_is_kept(found: Architecture, before: Cost, pruner: NSSPruner) -> None:
    report, after = pruner.report, measure(found.model, found.example())
    assert report is not None
    options = _options(found)
    for key, kept in (
        ("macs_budget", after.macs / before.macs),
        ("params_budget", after.parameters / before.parameters),
    ):
        missed = key in options and abs(kept - options[key]) > 0.01 + 1e-9
        said = any("the budget is" in note for note in report.notes)
        _expect(not missed or said, f"{kept:.3f} is kept, {key} is {options.get(key)}")


def _backward_works(found: Architecture) -> None:
    model = copy.deepcopy(found.model).train()
    inputs = found.example(4)
    made = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    sum(each.square().sum() for each in (made if isinstance(made, tuple) else [made])).backward()


def _saved_is_loaded(found: Architecture) -> None:
    fresh, inputs = architecture(found.seed).model, found.example(3, seed=8)
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(found.model, Path(folder) / "model")
        load_pruned(Path(folder) / "model", fresh)
    expected, loaded = outputs(found.model, inputs), outputs(fresh, inputs)
    same = all(torch.equal(a, b) for a, b in zip(expected, loaded, strict=True))
    _expect(same, "what is loaded is not what was saved")


def _prunes_again(found: Architecture) -> None:
    try:
        NSSPruner(found.model, found.example(), **{**_options(found), "fold": True}).step()
    except NSSPruneError:
        return
    outputs(found.model, found.example())
