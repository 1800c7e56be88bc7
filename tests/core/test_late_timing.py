"""Seconds that are measured when they are read, of a model as it was."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.late_timing import LateSeconds, MetaCopy


class Lookup(nn.Module):
    """Reads a table at positions in a buffer: random ones would be outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("positions", torch.tensor([3, 0, 1]))

    def forward(self, inputs: Tensor) -> Tensor:
        positions: Any = self.positions
        seen.append((inputs.is_meta, tuple(self.linear.weight.shape), positions.tolist()))
        made: Tensor = self.linear(inputs)[:, positions]
        return made


seen: list[tuple[bool, tuple[int, ...], list[int]]] = []


def test_the_model_is_timed_as_it_was() -> None:
    seen.clear()
    model = Lookup()
    late = LateSeconds(MetaCopy(model, torch.ones(2, 4)), 1.5)
    model.linear = nn.Linear(9, 9)
    assert seen == []
    before, after = late
    assert after == 1.5
    assert 0 < before < 1
    assert all(one == (False, (4, 4), [3, 0, 1]) for one in seen)
    calls = len(seen)
    assert late[0] == before
    assert len(seen) == calls > 1


def test_copies_and_files_have_the_numbers() -> None:
    @dataclass
    class Figures:
        latency: Any

    late = LateSeconds(MetaCopy(nn.Linear(2, 2), torch.ones(1, 2)), 0.25)
    assert copy.deepcopy(late) == tuple(late)
    assert pickle.loads(pickle.dumps(late)) == tuple(late)
    assert json.loads(json.dumps(asdict(Figures(late)))) == {"latency": list(late)}


def test_a_call_that_fails_is_not_a_number() -> None:
    def fails(model: nn.Module, inputs: Any) -> Any:
        raise RuntimeError

    before, after = LateSeconds(MetaCopy(nn.Linear(2, 2), torch.ones(1, 2), fails), 0.5)
    assert math.isnan(before)
    assert after == 0.5


def test_two_models_are_timed_in_turns() -> None:
    called: list[int] = []

    def forward(model: Any, inputs: Tensor) -> Tensor:
        called.append(model.out_features)
        made: Tensor = model(inputs)
        return made

    sides = (MetaCopy(nn.Linear(4, width), torch.ones(2, 4), forward) for width in (8, 3))
    before, after = LateSeconds(*sides)
    assert 0 < before < 1
    assert 0 < after < 1
    rounds = [set(called[at : at + 2]) for at in range(4, len(called), 2)]
    assert len(rounds) >= 5
    assert all(one == {8, 3} for one in rounds)
