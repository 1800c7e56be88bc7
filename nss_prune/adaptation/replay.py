"""What is replayed of earlier tasks while another one is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from nss_prune.adaptation.datasets import (
    Chained,
    Data,
    Moved,
    parts,
    repeatable,
    sampled,
    with_classes,
)
from nss_prune.core.processes import agreed
from nss_prune.errors import ArgumentError

Replay = float | Sampler[Any] | Data
"""A share of earlier data, a sampler over it, or batches."""


@agreed()
def replayed(replay: Replay, earlier: Sequence[Data], seed: int, device: torch.device) -> Moved:
    """Batches to replay, on a device.

    Args:
        replay: A share in (0, 1] of all earlier data, a sampler over the first of it, or batches.
        earlier: Data of earlier tasks.
        seed: Of the draw of a share.

    Raises:
        ArgumentError: There is no such data, or no such share.
        DataError: Batches that can be iterated only once.
    """
    if isinstance(replay, (int, float)):
        if not 0 < replay <= 1 or not earlier:
            raise ArgumentError(
                f"replay is {replay!r} with {len(earlier)} earlier data sets; give a share "
                "in (0, 1] with data= of the first task, or batches to replay"
            )
        drawn = [parts(data, replay, seed)[0] for data in earlier]
        return Moved(Chained(drawn), device, with_classes)
    if isinstance(replay, Sampler):
        loader = earlier[0] if earlier else None
        if not isinstance(loader, DataLoader):
            raise ArgumentError("replay is a sampler; give data= as a DataLoader for it")
        return Moved(sampled(loader, replay), device, with_classes)
    return Moved(repeatable(replay), device, with_classes)
