"""The structures that are recognised unless a user gives others."""

from __future__ import annotations

from nss_prune.structures.attention import Attention
from nss_prune.structures.gated import GatedUnit
from nss_prune.structures.multihead import TorchAttention
from nss_prune.structures.protocol import Adapter

ADAPTERS: tuple[Adapter, ...] = (
    Attention(),
    Attention(head_first=True),
    TorchAttention(),
    GatedUnit(),
)
"""The structures known; the first adapter that claims a module has it."""
