"""The types in the signature of NSSPruner, and its defaults."""

from __future__ import annotations

from typing import Literal

from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.profiling.accumulation import Loss
from nss_prune.profiling.categories import Categories
from nss_prune.profiling.contributions.protocol import Contribution
from nss_prune.profiling.profile import Profile
from nss_prune.profiling.similarity import Features
from nss_prune.pruner.cost import CostSpec
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.strategy import Importance, Score, Strategy
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter

NamedStrategy = Literal["semantic", "category", "global", "divergence"]

Ranked = Literal["magnitude", "signed"]

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Categories",
    "Contribution",
    "CostSpec",
    "Features",
    "Importance",
    "Loss",
    "NamedStrategy",
    "NeuronMap",
    "Profile",
    "Ranked",
    "Repair",
    "Score",
    "Slice",
    "Strategy",
]
