"""What sums take in memory, and the parts of a model whose sums fit into a limit together."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from nss_prune.errors import DataError
from nss_prune.graph.neurons import NeuronGroup

Item = TypeVar("Item")

BYTES = 12  # for each pair of channels: a sum in float64, and rows that wait in float32
MEMORY_LIMIT = 2**32
"""Bytes that the sums of a pass may take, unless ``memory_limit`` says otherwise."""


def parts_within(
    items: Iterable[Item], size: Callable[[Item], int], limit: float
) -> list[list[Item]]:
    """Items in their order, in parts of at most ``limit`` bytes; a larger item is a part itself."""
    parts: list[list[Item]] = []
    taken = 0
    for item in items:
        if not parts or taken + size(item) > limit:
            parts.append([])
            taken = 0
        parts[-1].append(item)
        taken += size(item)
    return parts


def check_passes(data: Any, passes: int, limit: float) -> None:
    """Raise where sums beyond the limit take several passes, and the data allows one.

    Raises:
        DataError: It is an iterator.
    """
    if passes > 1 and isinstance(data, Iterator):
        raise DataError(
            f"the sums take {passes} passes over the data with memory_limit={limit:,.0f} bytes, "
            f"and a {type(data).__name__} can be iterated only once; give a list of batches or a "
            "DataLoader, or raise memory_limit"
        )


def group_bytes(group: NeuronGroup) -> int:
    """Of the sums of a group's activations, of one category."""
    return BYTES * group.size**2


def mapped(tensor: Tensor) -> Tensor:
    """The values in a temporary file that is mapped into memory, on the CPU.

    The system reads and drops its pages as there is room. ``TMPDIR`` says where the file is.
    """
    handle, path = tempfile.mkstemp(prefix="nss_prune-")
    os.close(handle)
    found = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    with contextlib.suppress(OSError):  # where a mapped file cannot be unlinked yet
        os.unlink(path)
    return found.view(tensor.shape).copy_(tensor)
