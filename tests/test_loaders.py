"""Loaders of forty kinds: each gives what the plain list of its batches gives, or is refused."""

from __future__ import annotations

import itertools
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("the models of the trials are those of Linux", allow_module_level=True)

from loaders import KINDS, USES, used

OTHERS = [use for use in USES if use != "theta"]
IN_TURN = list(zip(KINDS, itertools.cycle(OTHERS)))
REPEATED = ("generator", "reused tensors", "cut from an endless one")  # where passes matter


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("kind", "use"),
    [
        *((kind, "theta") for kind in KINDS),
        *((kind, use) for kind, use in IN_TURN if "workers" not in kind and kind not in REPEATED),
        *itertools.product(REPEATED, OTHERS),
    ],
)
def test_a_loader_gives_what_the_list_gives_or_is_refused(kind: str, use: str) -> None:
    outcome, why = used(kind, use)
    assert outcome in ("survived", "refused"), why


def test_there_are_loaders_of_twenty_kinds_that_are_taken_and_some_that_are_not() -> None:
    taken = [kind for kind in KINDS.values() if kind.same_as is not None]
    assert len(taken) >= 20
    assert len(KINDS) - len(taken) >= 10
