"""Smaller pictures, on which a removal can be tried for less."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nss_prune.core.nested import map_tensors, tensors_in

PIECE = 32  # pixels; what models that halve their maps five times can divide


def smaller(example_inputs: Any) -> Any | None:
    """The inputs with a quarter of each picture's height and width; None where there are none."""
    small = map_tensors(piece, example_inputs)
    pairs = zip(tensors_in(small), tensors_in(example_inputs), strict=True)
    return small if any(part.shape != whole.shape for part, whole in pairs) else None


def piece(tensor: Tensor) -> Tensor:
    """A quarter of a picture's height and width, in multiples of 32 pixels."""
    if tensor.dim() != 4 or min(tensor.shape[2:]) < 2 * PIECE:
        return tensor
    height, width = (-(-side // (4 * PIECE)) * PIECE for side in tensor.shape[2:])
    return tensor[..., :height, :width]
