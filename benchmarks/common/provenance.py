"""What produced a result: command, seeds, versions, machine and date."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("nss_prune", "torch", "torchvision", "torch-pruning", "captum", "timm")


def provenance(seeds: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """Command, seeds, versions, machine and date: what a number needs to be made again."""
    return {
        "command": command(sys.argv),
        "seeds": list(seeds),
        "versions": {"python": platform.python_version(), **versions()},
        "machine": {
            "cpu": processor(),
            "cores": available_cores(),
            "device": device_name(torch.device(device)),
            "system": platform.system(),
        },
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def command(argv: Sequence[str]) -> str:
    """The command line, with folders of this machine written as DIR: a file is to be shared."""
    script = f"benchmarks/{Path(argv[0]).name}"
    return shlex.join(["python", script, *map(shareable, argv[1:])])


def shareable(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}DIR" if Path(value).is_absolute() else word


def versions() -> dict[str, str | None]:
    return {package: version(package) for package in PACKAGES}


def version(package: str) -> str | None:
    """The version that a package states itself, else that of its installation; None without it."""
    stated = getattr(sys.modules.get(package.replace("-", "_")), "__version__", None)
    try:
        return str(stated or metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def available_cores() -> int:
    """The cores that this process may use, which can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
