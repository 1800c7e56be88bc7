"""Faults of what is around a pruning: a few of each kind, and those that once did harm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("kills, limits and forks are those of Linux", allow_module_level=True)

from faults import faults

FOUND = {"interrupts": (7,)}  # the thread of the deadline and its caller waited for each other
FEW = {kind: (*range(3), *FOUND.get(kind, ())) for kind in faults()}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Forked processes cannot use the threads of their parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", FEW)
def test_a_fault_changes_nothing_and_is_told(kind: str, tmp_path: Path) -> None:
    trials = faults()[kind]
    for number in FEW[kind]:
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome, why = trials[number % len(trials)](number, folder)
        assert outcome in ("survived", "refused"), f"{number}: {why}"
