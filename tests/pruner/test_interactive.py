"""Groups to prune one by one that torch-pruning does not follow, and the history of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

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


MODELS: dict[type[nn.Module], tuple[int, ...]] = {
    Recurrent: (2, 5, 6),
    Halves: (2, 3, 8, 8),
    Encoder: (2, 5, 6),
}


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
