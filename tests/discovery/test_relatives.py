"""What is not followed has a row with a true reason, and what can be followed is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional

from nss_prune import NSSPruner
from nss_prune.errors import NothingToPruneError

MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)


class Spatial(nn.Module):
    """A map of weights made of the mean and the maximum of all channels, by one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixed = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 1, 3, padding=1)
        self.second, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        maps = self.first(inputs).relu()
        seen = torch.cat([maps.mean(1, keepdim=True), maps.amax(1, keepdim=True)], 1)
        maps = maps * self.mixed(seen).sigmoid()
        made: Tensor = self.head(self.second(maps).relu().mean((2, 3)))
        return made


class Cell(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.cell, self.hidden, self.head = kind(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        state: Any = None
        for step in inputs.unbind(1):
            state = self.cell(step, state)
        hidden = state[0] if isinstance(state, tuple) else state
        made: Tensor = self.head(self.hidden(hidden).relu())
        return made


class LastState(nn.Module):
    """The hidden units go on as the last state, and not as the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.head(self.rnn(inputs)[1][0][-1])
        return made


class GatedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        made: Tensor = self.head(functional.glu(self.both(inputs), -1))
        return made


class GatedHalves(GatedLinear):
    """torch-pruning ranks each half by itself, and takes the partners along."""

    def forward(self, inputs: Tensor) -> Tensor:
        gates, values = self.both(inputs).chunk(2, -1)
        made: Tensor = self.head(functional.silu(gates) * values)
        return made


def halved(model: nn.Module, inputs: Tensor) -> dict[str, tuple[int, str]]:
    """Layer -> channels that stay, and why; the smaller model gives what the masked one gives."""
    whole = copy.deepcopy(model)
    pruner = NSSPruner(model, inputs, MAGNITUDE, pruning_ratio=0.5, fold=False)
    pruner.step()
    with torch.no_grad(), pruner.slice.masked(whole):
        wanted = whole(inputs)
    assert torch.allclose(model(inputs), wanted, atol=1e-5)
    assert pruner.report is not None
    return {row.layer: (row.after, row.reason) for row in pruner.report.rows}


def test_channels_that_meet_in_a_mean_are_named() -> None:
    torch.manual_seed(0)
    rows = halved(Spatial().eval(), torch.randn(2, 3, 8, 8))
    assert rows["first"] == (8, "its channels meet in mean, which is not followed")
    assert rows["second"] == (3, "")
    assert rows["mixed"][1]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_named(kind: Any) -> None:
    torch.manual_seed(0)
    rows = halved(Cell(kind).eval(), torch.randn(2, 4, 6))
    assert rows["cell"][0] == 8
    assert "nn.LSTM" in rows["cell"][1]
    assert rows["hidden"] == (5, "")


def test_hidden_units_that_go_on_as_a_state() -> None:
    torch.manual_seed(0)
    model = LastState().eval()
    assert halved(model, torch.randn(2, 4, 6))["rnn"] == (4, "")
    assert model.rnn.hidden_size == 4


@pytest.mark.parametrize("kind", [GatedLinear, GatedHalves])
def test_halves_of_a_gated_unit_go_by_the_ratio(kind: type[GatedLinear]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    halved(model, torch.randn(2, 6))
    assert (model.both.out_features, model.head.in_features) == (8, 4)


def test_a_single_channel_cannot_go() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 2, 1))
    with pytest.raises(NothingToPruneError, match="single channel"):
        NSSPruner(model, torch.randn(1, 3, 4, 4), MAGNITUDE, pruning_ratio=0.5)
