"""The versions and the command line that a result was made with."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("nss_prune", "torch", "torch-pruning", "timm", "torchvision")


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed, and Python's."""
    found = {"python": platform.python_version(), "nss_prune": "not installed"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command_line(arguments: Sequence[str] | None) -> str:
    """What was typed."""
    return shlex.join(["nss-prune", *(sys.argv[1:] if arguments is None else arguments)])
