"""What trained and what kept its bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's parameters and buffers."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def entries_with_names(
    model: nn.Module, entries: dict[str, Tensor], channels: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(name of a parameter or running statistic, True where it trains)."""
    yield from entries.items()
    for name, mask in channels.items():
        yield f"{name}.running_mean", mask
        yield f"{name}.running_var", mask


def assert_only_these_moved(
    model: nn.Module, before: dict[str, Tensor], trains: Iterator[tuple[str, Tensor]]
) -> None:
    """Some of what trains has other bits than before, and nothing else has."""
    after = model.state_dict()
    for name, mask in trains:
        old, new = before[name], after[name]
        assert torch.equal(old[~mask], new[~mask]), name
        if mask.any():
            assert (old[mask] != new[mask]).any(), name
        assert new.isfinite().all()
