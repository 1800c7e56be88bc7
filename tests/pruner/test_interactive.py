"""Groups to prune one by one that torch-pruning does not follow, and the history of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from networks import TiedLanguage
from nss_prune import NSSPruner
from nss_prune.errors import GraphError


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 16, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.head(self.rnn(inputs)[0][:, -1])
        return made


class Halves(nn.Module):
    """Gates and values in the halves of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Conv2d(3, 16, 3, padding=1)
        self.beside = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        values, gates = self.both(inputs).chunk(2, 1)
        made: Tensor = self.head(
            self.last(values * gates.sigmoid() + self.beside(values)).mean((2, 3))
        )
        return made


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.head(self.layer(self.embed(inputs)).mean(1))
        return made


class CrossStage(nn.Module):
    """Two halves and what becomes of one of them lie side by side, as in C2f."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 10, 3, padding=1)
        self.last, self.head = nn.Conv2d(34, 12, 1), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = list(self.norm(self.first(inputs)).relu().chunk(2, 1))
        parts += [self.second(parts[-1]).relu()]
        parts += [self.third(parts[-1]).relu()]
        made: Tensor = self.head(self.last(torch.cat(parts, 1)).mean((2, 3)))
        return made


class Swapped(nn.Module):
    """Halves that change places on their way, of which torch-pruning follows neither."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.first(inputs).relu().mean((2, 3))
        made: Tensor = self.head(torch.cat([maps[:, 8:], maps[:, :8]], 1))
        return made


class Flipped(nn.Module):
    """torch-pruning takes other channels of the head, and as many."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.head(self.first(inputs).relu().flip(-1))
        return made


MODELS: dict[type[nn.Module], tuple[int, ...]] = {
    Recurrent: (2, 5, 6),
    Halves: (2, 3, 8, 8),
    Encoder: (2, 5, 6),
}


MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)
MAPPED: dict[type[nn.Module], tuple[tuple[int, ...], bool]] = {
    CrossStage: ((2, 3, 8, 8), False),
    Swapped: ((2, 3, 8, 8), False),
    Flipped: ((2, 6), True),
    TiedLanguage: ((2, 5), True),
}
"""Model -> shape of its inputs, and whether torch-pruning's history can say what it lost."""


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("kind", MAPPED, ids=lambda kind: kind.__name__)
def test_groups_that_torch_pruning_maps_otherwise(kind: type[nn.Module], interactive: bool) -> None:
    torch.manual_seed(0)
    shape, is_said = MAPPED[kind]
    model, inputs = kind().eval(), torch.rand(shape)
    whole = copy.deepcopy(model)
    pruner = NSSPruner(model, inputs, MAGNITUDE, pruning_ratio=0.5, fold=False)
    for group in pruner.step(interactive=interactive) or ():
        group.prune()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count < 0.6 * sum(parameter.numel() for parameter in whole.parameters())
    with pruner.slice.masked(whole):
        torch.testing.assert_close(model(inputs), whole(inputs))
    if kind is TiedLanguage:
        assert model.head.weight is model.embed.weight
    if not is_said:
        with pytest.raises(GraphError, match="save_pruned"):
            pruner.pruning_history()
        return
    fresh = replayed(copy.deepcopy(whole), inputs, pruner.pruning_history())
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(inputs), model(inputs))


def pruned(model: nn.Module, inputs: Tensor, *, interactive: bool) -> NSSPruner:
    data = [(inputs, torch.tensor([0, 1]))]
    pruner = NSSPruner(
        model, inputs, params_budget=0.6, round_to=1, data=data, strategy="semantic", fold=False
    )
    for group in pruner.step(interactive=interactive) or ():
        group.prune()
    return pruner


def replayed(model: nn.Module, inputs: Tensor, history: Any) -> nn.Module:
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    graph.load_pruning_history(history)
    return model


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_one_by_one_as_at_once(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, inputs = kind().eval(), torch.randn(MODELS[kind])
    at_once, one_by_one = copy.deepcopy(model), copy.deepcopy(model)
    pruners = [
        pruned(at_once, inputs, interactive=False),
        pruned(one_by_one, inputs, interactive=True),
    ]
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, at_once, one_by_one)]
    assert sizes[2] == sizes[1] < sizes[0]
    torch.testing.assert_close(one_by_one(inputs), at_once(inputs))
    for pruner in pruners:
        if kind is Halves:
            fresh = replayed(copy.deepcopy(model), inputs, pruner.pruning_history())
            torch.testing.assert_close(fresh(inputs), at_once(inputs))
        else:
            with pytest.raises(GraphError, match="save_pruned"):
                pruner.pruning_history()


def test_groups_that_are_not_pruned_stay() -> None:
    torch.manual_seed(0)
    model, inputs = Encoder().eval(), torch.randn(MODELS[Encoder])
    before = copy.deepcopy(model)
    data = [(inputs, torch.tensor([0, 1]))]
    pruner = NSSPruner(model, inputs, params_budget=0.6, data=data, strategy="semantic")
    assert list(pruner.step(interactive=True) or ())
    torch.testing.assert_close(model(inputs), before(inputs))
