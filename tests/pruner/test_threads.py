"""Pruners in several threads do what they do one after the other."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from networks import Residual, batches, cnn, mlp
from nss_prune import NSSPruner

MODELS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: mlp(hidden=(40, 30)), (12,)), (cnn, (3, 12, 12)), (Residual, (6,)), (mlp, (12,)),
]  # fmt: skip


def pruned(number: int) -> nn.Module:
    make, shape = MODELS[number]
    model = make().double()
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    pruner = NSSPruner(
        model,
        torch.zeros(1, *shape).double(),
        data=batches(104, shape, 3),
        macs_budget=0.5,
        progress=False,
    )
    pruner.step()
    return model


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_budgets_of_four_models_in_four_threads_are_those_of_one() -> None:
    expected = [pruned(number) for number in range(4)]
    found: dict[int, nn.Module] = {}
    threads = [
        threading.Thread(target=lambda n=number: found.update({n: pruned(n)}))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, model in enumerate(expected):
        state = found[number].state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(state[name], value), f"{number}: {name}"
