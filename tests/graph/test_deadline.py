"""A time limit that works, names the layer, and never fires afterwards."""

from __future__ import annotations

import time

import pytest
from torch import nn

from nss_prune.errors import GraphError
from nss_prune.graph.deadline import deadline


def circle(module: nn.Module) -> None:
    while True:
        try:
            time.sleep(0.001)
        except Exception:
            continue


def test_what_never_ends_is_interrupted_and_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    start = time.monotonic()
    with pytest.raises(GraphError, match=r"0\.2 s.*'0'.*timeout"), deadline(0.2, model):
        circle(model[0])
    assert time.monotonic() - start < 10


class Finalised:
    """Swallows what is raised in it, as Python does for every finaliser."""

    def __del__(self) -> None:
        for _ in range(50):
            time.sleep(0.01)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_that_a_finaliser_swallows_comes_again() -> None:
    model = nn.Linear(2, 2)

    def finalise_and_circle() -> None:
        Finalised()
        circle(model)

    with pytest.raises(GraphError), deadline(0.1, model):
        finalise_and_circle()


def test_what_is_done_in_time_is_left_in_peace() -> None:
    model = nn.Linear(2, 2)
    with deadline(0.05, model):
        pass
    time.sleep(0.1)
    with pytest.raises(ZeroDivisionError), deadline(5, model):
        raise ZeroDivisionError
