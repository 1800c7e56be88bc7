"""The most memory that was in use so far: of the process, or of a GPU."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int | None:
    """Bytes in use at most since the process began; None where the system does not say.

    On a GPU those that torch took there; elsewhere the resident set of the process. Nothing is
    reset, so that the figures of others stay theirs: it never falls, unless they reset it.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
