"""A step that fails leaves the pruner as it was: the next one gives what an unbroken step gives."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from networks import batches, cnn, settled
from nss_prune import NSSPruner


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
