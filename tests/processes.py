"""Run a function in several processes of torch.distributed."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["nss_prune", "timm", "timm.optim", "torch.distributed", "torchvision"]
"""Imported once for all processes, which takes longer than what they do."""


def in_processes(
    function: Callable[..., None], folder: object, *arguments: Any, number: int = 2
) -> None:
    """Call ``function(rank, folder, *arguments)`` in processes that share a group.

    Args:
        function: Of a module, not of another function.
        folder: For what they write, and for their meeting.
        number: How many there are.
    """
    method = "spawn"
    if "forkserver" in multiprocessing.get_all_start_methods():
        method = "forkserver"
        multiprocessing.get_context(method).set_forkserver_preload(PRELOADED)
    mp.start_processes(
        _member, args=(function, str(folder), arguments, number), nprocs=number, start_method=method
    )


def _member(
    rank: int, function: Callable[..., None], folder: str, arguments: tuple[Any, ...], number: int
) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous{number}",
        rank=rank,
        world_size=number,
        timeout=timedelta(seconds=60),
    )
    try:
        function(rank, folder, *arguments)
    finally:
        dist.destroy_process_group()
