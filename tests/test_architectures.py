"""Random networks: pruned rightly or refused in words, and those that once were not."""

from __future__ import annotations

import os

import pytest

from architectures import architecture, check, data
from nss_prune import NSSPruner
from nss_prune.errors import GraphError

FOUND = (141,)  # that once were not: a budget counted all of an LSTM's products as staying
COUNT = int(os.environ.get("NSS_PRUNE_ARCHITECTURES", "50"))


@pytest.mark.parametrize("seed", sorted({*range(COUNT), *FOUND}))
def test_a_random_network_is_pruned_rightly_or_refused_in_words(seed: int) -> None:
    assert check(architecture(seed)).startswith(("survived", "refused: "))


def test_a_ratio_names_the_recurrent_layer_in_its_way_and_theta_prunes_it() -> None:
    found = architecture(50)
    given = {"data": data(found), "outputs": "classes", "progress": False}
    with pytest.raises(GraphError, match=r"hidden units of 'body\.1\.layer'.*a budget or theta"):
        NSSPruner(found.model, found.example(), pruning_ratio=0.3, **given)
    before = sum(parameter.numel() for parameter in found.model.parameters())
    NSSPruner(found.model, found.example(), theta=0.8, **given).step()
    assert sum(parameter.numel() for parameter in found.model.parameters()) < before
