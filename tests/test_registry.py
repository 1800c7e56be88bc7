"""Every metric, strategy, repair and adapter, by the same properties."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from nss_prune import NSSPruner
from nss_prune.profiling.contributions import metrics_known
from nss_prune.profiling.selection import STRATEGIES
from nss_prune.structures.known import ADAPTERS
from tests.networks import batches, cnn, fingerprint, settled

BUDGETS: dict[str, dict[str, Any]] = {
    "params_budget": {"params_budget": 0.6},
    "macs_budget": {"macs_budget": 0.6},
    "max_divergence": {"max_divergence": 0.5},
}
SELECTIONS: dict[str, dict[str, Any]] = {
    **{f"metric {name}": {"theta": 0.6, "metric": name} for name in metrics_known()},
    **{f"strategy {name}": {"pruning_ratio": 0.4, "strategy": name} for name in STRATEGIES},
    **BUDGETS,
}
REPAIRS: dict[str, dict[str, Any]] = {
    "fold": {"fold": True},
    "refit": {"fold": "refit"},
    "recalibrate": {"fold": False, "recalibrate": True},
    "balance": {"fold": False, "balance": True},
}
EVERYTHING = {
    **{name: {"fold": False, **arguments} for name, arguments in SELECTIONS.items()},
    **{name: {"macs_budget": 0.6, **arguments} for name, arguments in REPAIRS.items()},
}
DATA = batches(60, (3, 12, 12), 5, size=20)
EXAMPLE = DATA[0][0][:2]


@pytest.fixture(scope="module")
def whole() -> nn.Module:
    torch.manual_seed(0)
    return settled(cnn(), torch.cat([inputs for inputs, _ in DATA]))


def pruned(whole: nn.Module, data: Any, arguments: dict[str, Any]) -> nn.Module:
    model = copy.deepcopy(whole)
    NSSPruner(model, EXAMPLE, data=data, round_to=1, progress=False, **arguments).step()
    return model


@pytest.mark.parametrize("arguments", EVERYTHING.values(), ids=EVERYTHING)
def test_twice_the_same_bits(whole: nn.Module, arguments: dict[str, Any]) -> None:
    once, twice = (pruned(whole, DATA, arguments).state_dict() for _ in range(2))
    for name, tensor in once.items():
        assert torch.equal(tensor, twice[name]), name


@pytest.mark.parametrize(
    "arguments",
    [way for name, way in EVERYTHING.items() if name != "recalibrate"],
    ids=[name for name in EVERYTHING if name != "recalibrate"],
)
def test_samples_in_reverse(whole: nn.Module, arguments: dict[str, Any]) -> None:
    """Recalibration is by batches, whose composition this changes."""
    reverse = [(inputs.flip(0), labels.flip(0)) for inputs, labels in reversed(DATA)]
    once = pruned(whole, DATA, arguments).state_dict()
    other = pruned(whole, reverse, arguments).state_dict()
    for name, tensor in once.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("arguments", SELECTIONS.values(), ids=SELECTIONS)
def test_removed_equals_masked(whole: nn.Module, arguments: dict[str, Any]) -> None:
    model = copy.deepcopy(whole)
    pruner = NSSPruner(
        model, EXAMPLE, data=DATA, round_to=1, progress=False, fold=False, **arguments
    )
    with pruner.slice.masked(model), torch.no_grad():
        masked = model(EXAMPLE)
    pruner.step()
    assert parameters(model) < parameters(whole)
    with torch.no_grad():
        torch.testing.assert_close(model(EXAMPLE), masked, rtol=1e-9, atol=1e-9)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Broken:
    """Data that fail at the second batch of that pass, of those that want a second batch."""

    def __init__(self, passes: int) -> None:
        self.left = passes

    def __len__(self) -> int:
        return len(DATA)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield DATA[0]
        self.left -= 1
        if self.left == 0:
            raise OSError("the disk is gone")
        yield from DATA[1:]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("arguments", EVERYTHING.values(), ids=EVERYTHING)
def test_intact_after_an_error(whole: nn.Module, arguments: dict[str, Any], passes: int) -> None:
    model = copy.deepcopy(whole)
    before = fingerprint(model)
    data = Broken(passes)
    try:
        NSSPruner(model, EXAMPLE, data=data, progress=False, **arguments).step()
    except OSError:
        assert same(fingerprint(model), before)
    else:
        assert data.left > 0, "the error was lost"


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    states = one.pop("state"), other.pop("state")
    return one == other and all(torch.equal(states[0][name], states[1][name]) for name in states[1])


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit = timm.layers.SwiGLU(12, 20)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.unit(inputs)


class HeadsFirst(nn.Module):
    """Fused attention whose channels are heads, then query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)

    def forward(self, inputs: Tensor) -> Tensor:
        samples, tokens, _ = inputs.shape
        parts = self.qkv(inputs).view(samples, tokens, self.num_heads, 3, self.head_dim)
        query, key, value = parts.permute(3, 0, 2, 1, 4)
        found = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(found.transpose(1, 2).flatten(2))


class Together(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs, need_weights=False)[0]


class Tokens(nn.Module):
    """A structure between a layer of tokens and a head."""

    def __init__(self, structure: nn.Module) -> None:
        super().__init__()
        self.stem, self.structure, self.head = nn.Linear(6, 12), structure, nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        return self.head((hidden + self.structure(hidden)).mean(1))


STRUCTURES = (
    ("Attention()", lambda: Attention(12, 4, qkv_bias=True)),
    ("Attention(head_first=True)", HeadsFirst),
    ("TorchAttention()", Together),
    ("GatedUnit()", Gated),
)


@pytest.mark.parametrize("number", range(len(ADAPTERS)), ids=[name for name, _ in STRUCTURES])
def test_every_adapter(number: int) -> None:
    """It claims its structure; what it removes equals what is masked; all repairs go with it."""
    torch.manual_seed(0)
    tokens = batches(40, (5, 6), 3, size=20)
    example = tokens[0][0][:2]
    whole = Tokens(STRUCTURES[number][1]()).double().eval()
    for repairs in ({"fold": False}, {"fold": True}, {"fold": "refit", "balance": True}):
        model = copy.deepcopy(whole)
        pruner = NSSPruner(
            model, example, data=tokens, params_budget=0.7, ignored_layers=[model.stem],
            round_to=1, progress=False, **repairs,
        )  # fmt: skip
        assert any(group.name.startswith("structure.") for group in pruner.neurons.groups)
        with pruner.slice.masked(model), torch.no_grad():
            masked = model(example)
        pruner.step()
        assert parameters(model) <= 0.7 * parameters(whole)
        if not repairs["fold"]:
            torch.testing.assert_close(model(example), masked, rtol=1e-9, atol=1e-9)
