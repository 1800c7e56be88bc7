"""Neither the order of the samples nor the size of the batches decides what is pruned."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nss_prune import NSSPruner
from tests.networks import batches, settled

ASKED = {
    "theta": {"theta": 0.5},
    "theta, all pairs": {"theta": 0.5, "features": "flat"},
    "ratio": {"pruning_ratio": 0.4},
    "global ratio": {"pruning_ratio": 0.4, "global_pruning": True},
    "best of each category": {"pruning_ratio": 0.4, "strategy": "category"},
    "best over all": {"pruning_ratio": 0.4, "strategy": "global"},
    "macs": {"macs_budget": 0.6},
    "parameters": {"params_budget": 0.5},
    "macs by one theta": {"macs_budget": 0.6, "strategy": "semantic"},
}
REPAIRED = {
    "removed": {"fold": False},
    "folded": {"fold": True},
    "refit": {"fold": "refit"},
    "folded and balanced": {"fold": True, "balance": True},
}


def network() -> nn.Sequential:
    """Maps of at most 64 positions, all of which are looked at, under two kinds of norm."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3, stride=2),
        nn.GroupNorm(2, 10),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(90, 14),
        nn.LayerNorm(14),
        nn.GELU(),
        nn.Linear(14, 4),
    ).double()


DATA = batches(96, (3, 8, 8), 4, size=32)
INPUTS, LABELS = (torch.cat(parts) for parts in zip(*DATA, strict=True))
MODEL = settled(network(), INPUTS)


def pruned(data: object, **arguments: object) -> dict[str, Tensor]:
    model = copy.deepcopy(MODEL)
    NSSPruner(model, INPUTS[:2], data=data, **arguments).step()
    return model.state_dict()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal, and smaller than the whole model."""
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in other.items()}
    assert any(one[name].shape != tensor.shape for name, tensor in MODEL.state_dict().items())
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("repairs", REPAIRED.values(), ids=REPAIRED)
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_shuffled_data_prunes_the_same(asked: dict, repairs: dict) -> None:
    torch.manual_seed(2)
    shuffled = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=24, shuffle=True)
    assert_same(pruned(DATA, **asked, **repairs), pruned(shuffled, **asked, **repairs))


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_batches_in_another_order_recalibrate_the_same(asked: dict) -> None:
    """Which samples share a batch is part of what batch statistics are, their order is not."""
    repairs = {"fold": True, "recalibrate": True, "balance": True}
    assert_same(pruned(DATA, **asked, **repairs), pruned(DATA[::-1], **asked, **repairs))
