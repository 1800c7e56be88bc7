"""DeepArc, the layer-level rival: layers that repeat the one before them.

Ren et al., "DeepArc: Modularizing Neural Networks for the Model Maintenance", ICSE 2023; section
2.2 of the NeuSemSlice paper. Consecutive layers whose outputs are similar by CKA form a module.
The first layer of a module makes its representation, the others are redundant: they can be
removed, or left out of the training.
"""

from __future__ import annotations

from nss_prune.deeparc.arc import DeepArc
from nss_prune.deeparc.layers import Layer, find_layers

__all__ = ["DeepArc", "Layer", "find_layers"]
