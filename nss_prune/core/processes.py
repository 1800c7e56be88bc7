"""Processes of torch.distributed that share the data: sums over them, and equal models.

Without torch.distributed, or before its init_process_group, there is one process.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def processes() -> int:
    """How many processes share the data."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return processes() == 1 or dist.get_rank() == 0


def wait() -> None:
    """Wait for all processes."""
    if processes() > 1:
        dist.barrier()


def total_counts(counts: Mapping[int, int]) -> dict[int, int]:
    """Category -> samples over all processes."""
    if processes() == 1:
        return dict(counts)
    everywhere: list[Mapping[int, int]] = [{}] * processes()
    dist.all_gather_object(everywhere, dict(counts))
    total: Counter[int] = Counter()
    for local in everywhere:
        total.update(local)
    return dict(total)


def total(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sums of some numbers over all processes."""
    if processes() == 1:
        return list(numbers)
    # Not float64 everywhere: some devices have none.
    summed: Tensor = torch.tensor(numbers, dtype=torch.float32, device=device)
    dist.all_reduce(summed)
    return [float(number) for number in summed]


@torch.no_grad()
def copy_from_first(model: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if processes() == 1:
        return
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor.data, src=0)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of what trains over the processes.

    Every process must have the same parameters. A parameter without a gradient counts as one
    whose gradient is zero.
    """
    if processes() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for dtype in sorted({parameter.dtype for parameter in trained}, key=str):
        gradients = [p.grad for p in trained if p.dtype == dtype and p.grad is not None]
        packed = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(packed)
        packed /= processes()
        pieces = packed.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view_as(gradient))
