"""A step that fails leaves the pruner as it was: the next one gives what an unbroken step gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from networks import batches, cnn, settled
from nss_prune import NSSPruner, profile


class Loader:
    """Batches, of which the one that is given out as number ``fault`` of all passes fails."""

    def __init__(self, data: list[Any], fault: int, error: type[BaseException]) -> None:
        self.data, self.fault, self.error, self.given = data, fault, error, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            self.given += 1
            if self.given == self.fault:
                raise self.error("the disk is gone")
            yield batch

    def __len__(self) -> int:
        return len(self.data)


def network() -> nn.Module:
    torch.manual_seed(0)
    return settled(cnn(), torch.randn(16, 3, 12, 12).double())


OPTIONS: dict[str, dict[str, Any]] = {
    "divergence": {"macs_budget": 0.6},
    "semantic": {"theta": 0.7},
    "refit and balance": {"theta": 0.7, "fold": "refit", "balance": True},
    "recalibrate": {"params_budget": 0.6, "recalibrate": True},
    "two steps": {"theta": 0.7, "iterative_steps": 2},
}


def pruned(data: Any, options: dict[str, Any], error: type[BaseException]) -> tuple[nn.Module, int]:
    """The model after all steps, each begun again where it fails; and how many failed."""
    model, failures = network(), 0
    example = torch.zeros(1, 3, 12, 12).double()
    pruner = NSSPruner(model, example, data=data, progress=False, **options)
    for _ in range(options.get("iterative_steps", 1)):
        before = copy.deepcopy(model.state_dict())
        try:
            pruner.step()
        except error:
            failures += 1
            after = model.state_dict()
            assert all(torch.equal(value, after[name]) for name, value in before.items())
            pruner.step()
    return model, failures


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_step_that_is_begun_again_gives_what_an_unbroken_one_gives(name: str, error) -> None:
    options, data = OPTIONS[name], batches(104, (3, 12, 12), 5, size=26)
    expected, _ = pruned(data, options, error)
    counting = Loader(data, 0, error)
    pruned(counting, options, error)
    for fault in range(1, counting.given + 1):
        found, failures = pruned(Loader(data, fault, error), options, error)
        assert failures == 1
        state = found.state_dict()
        for key, value in expected.state_dict().items():
            assert torch.equal(state[key], value), f"{key} after a fault at batch {fault}"


class Counting(nn.Module):
    """Counts its calls in a buffer, an attribute and a list, and remembers a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.calls, self.shapes = 0, [(0,)]
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.shapes.append(tuple(inputs.shape))
        self.seen += len(inputs)
        self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
        self.last = inputs
        return self.second(torch.relu(self.first(inputs)))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_the_constructor_and_profile_leave_what_calls_change_as_found() -> None:
    torch.manual_seed(0)
    model, data = Counting().double(), batches(104, (6,), 3)
    mean = model.mean

    def assert_as_found() -> None:
        assert (model.calls, model.shapes, model.mean) == (0, [(0,)], mean)
        assert not bool(model.seen)
        assert not hasattr(model, "last")

    profile(model, data)
    assert_as_found()
    pruner = NSSPruner(model, torch.zeros(2, 6).double(), data=data, macs_budget=0.6)
    assert_as_found()
    assert pruner.slice.kept
    assert_as_found()
