"""Other coordinates of heads, as changes of basis of the layers around them."""

from __future__ import annotations

import torch
from torch import Tensor

from nss_prune.graph.bases import BasisChange
from nss_prune.structures.dimensions import Dimensions


def basis_changes(
    prefix: str, found: Dimensions, products: Tensor, values: Tensor
) -> tuple[BasisChange, ...]:
    """New coordinates of all heads of an attention module, which change nothing that it gives.

    Args:
        prefix: Before the names of its layers: its own name and a dot, or "".
        products: A of each head: queries become A q and keys A⁻ᵀ k, ``[heads, width, width]``.
        values: R of each head: values become R v, ``[heads, width, width]``.
    """
    keys = torch.linalg.inv(products).transpose(1, 2)
    read = torch.linalg.inv(values)
    makers = ((found.queries, products), (found.keys, keys), (found.values, values))
    return (
        *(BasisChange(prefix + part.name, "out", part.channels, m) for part, m in makers),
        BasisChange(prefix + found.consumer.name, "in", found.consumer.channels, read),
    )
