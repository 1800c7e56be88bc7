"""Random networks: pruned rightly or refused in words, and those that once were not."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

import parts
from architectures import Architecture, architecture, shrunk
from nss_prune import NSSPruner
from nss_prune.errors import GraphError
from parts import macs_by_hand
from properties import check

FOUND: tuple[int, ...] = (764, 1131)  # seeds beyond the count that once were not
COUNT = int(os.environ.get("NSS_PRUNE_ARCHITECTURES", "50"))


@pytest.mark.parametrize("seed", sorted({*range(COUNT), *FOUND}))
def test_a_random_network_is_pruned_rightly_or_refused_in_words(seed: int) -> None:
    found = architecture(seed)
    assert check(found).startswith(("survived", "refused: ")), str(found)


def recurrent(kind: type, **options: float) -> Architecture:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(6, 8), parts.Recurrent(kind, 8, 8, 1, False), parts.Mean((1,)), nn.Linear(8, 9)
    )
    model = parts.Outputs(body, 9, 1, False, False).double().eval()
    given = {"outputs": "classes", "fold": False, "progress": False}
    return Architecture(0, model, (5, 6), options={**options, **given})


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_budget_counts_the_products_of_recurrent_layers_that_go(kind: type) -> None:
    assert check(recurrent(kind, macs_budget=0.5)) == "survived"


def test_a_ratio_names_the_recurrent_layer_in_its_way_and_theta_prunes_it() -> None:
    found = recurrent(nn.GRU)
    with pytest.raises(GraphError, match=r"hidden units of 'body\.1\.layer'.*a budget or theta"):
        NSSPruner(
            found.model, found.example(), data=found.data(), pruning_ratio=0.3, **found.options
        )
    before = sum(parameter.numel() for parameter in found.model.parameters())
    NSSPruner(found.model, found.example(), data=found.data(), theta=0.8, **found.options).step()
    assert sum(parameter.numel() for parameter in found.model.parameters()) < before


def test_products_are_counted_by_hand_as_in_plain_loops() -> None:
    """The oracle of the networks: each product of a layer, one by one."""
    convolution = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    assert macs_by_hand(convolution, torch.zeros(2, 4, 5, 5)) == sum(
        1 for _ in range(2 * 6 * 5 * 5) for _ in range(2) for _ in range(3 * 3)
    )
    assert macs_by_hand(nn.Linear(4, 3), torch.zeros(2, 5, 4)) == 2 * 5 * 4 * 3
    gates = 4 * (8 * 6 + 8 * 8)  # of an LSTM, from the input and from the state before
    assert macs_by_hand(nn.LSTM(6, 8, batch_first=True), torch.zeros(2, 5, 6)) == 2 * 5 * gates


def test_a_network_shrinks_to_the_parts_that_a_failure_needs() -> None:
    seed = next(s for s in range(1000) if {"excited", "twice"} <= set(architecture(s).parts))
    smaller = shrunk(seed, lambda found: "excited" in found.parts)
    assert len(smaller.parts) == 3  # the part, how maps end, and the outputs
    assert "excited" in smaller.parts
    assert str(smaller).startswith(f"seed {seed} without")
    again = architecture(seed, smaller.without).model.state_dict()
    assert all(
        torch.equal(value, again[name]) for name, value in smaller.model.state_dict().items()
    )
