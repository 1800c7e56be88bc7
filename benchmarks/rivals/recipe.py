"""What torch-pruning's standard recipe is told about a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def attention_heads(network: nn.Module) -> dict[nn.Module, int]:
    """The fused query, key and value layers of attention -> their heads."""
    modules: Iterable[Any] = network.modules()
    return {
        module.qkv: module.num_heads
        for module in modules
        if isinstance(getattr(module, "num_heads", None), int)
        and isinstance(getattr(module, "qkv", None), nn.Linear)
    }
