"""Random networks: pruned rightly or refused in words, and those that once were not."""

from __future__ import annotations

import os

import pytest

from architectures import architecture, check

FOUND = (141,)  # that once were not: a budget counted all of an LSTM's products as staying
COUNT = int(os.environ.get("NSS_PRUNE_ARCHITECTURES", "50"))


@pytest.mark.parametrize("seed", sorted({*range(COUNT), *FOUND}))
def test_a_random_network_is_pruned_rightly_or_refused_in_words(seed: int) -> None:
    assert check(architecture(seed)).startswith(("survived", "refused: "))
