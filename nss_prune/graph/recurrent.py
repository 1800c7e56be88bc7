"""Recurrent layers: a hidden unit is a neuron, with all of its gates.

``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` have one number of hidden units for all layers and both
directions, so unit j of a stacked or bidirectional one is unit j everywhere. It makes its rows of
``weight_ih``, ``weight_hh`` and the biases, once for each gate. It is consumed by the columns of
``weight_hh``, by those of the next layer's ``weight_ih``, and by whatever layer comes behind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


def has_plain_units(module: nn.RNNBase) -> bool:
    """Whether outputs are the hidden units themselves, and not projected (``proj_size``)."""
    return module.mode in GATES and module.proj_size == 0


def directions(module: nn.RNNBase) -> int:
    """Number of directions, 1 or 2."""
    return 2 if module.bidirectional else 1


def internal_sides(module: nn.RNNBase) -> Iterator[tuple[str, int]]:
    """Parameters whose columns consume the hidden units, and how often each unit comes there."""
    for key in module._parameters:
        if key.startswith("weight_hh"):
            yield key, 1
        elif key.startswith("weight_ih") and not reads_inputs(key):
            yield key, directions(module)


def reads_inputs(key: str) -> bool:
    """Whether a parameter is of the first layer, which consumes what the module is given."""
    return key.removesuffix("_reverse") == "weight_ih_l0"


class RecurrentPruner:
    """torch-pruning's functions for a recurrent layer; the columns inside are parameters apart."""

    def prune_out_channels(self, layer: nn.RNNBase, indices: list[int]) -> nn.RNNBase:
        """Remove the rows of hidden units from all gates, given all of their output channels."""
        stays = torch.ones(layer.hidden_size, dtype=torch.bool)
        stays[torch.tensor(indices) % layer.hidden_size] = False
        rows = stays.repeat(GATES[layer.mode]).nonzero().flatten()
        for key, parameter in list(layer._parameters.items()):
            if parameter is not None:
                _replace(layer, key, parameter.detach().index_select(0, rows.to(parameter.device)))
        layer.hidden_size = int(stays.sum())
        return layer

    def prune_in_channels(self, layer: nn.RNNBase, indices: list[int]) -> nn.RNNBase:
        """Remove columns of what the first layer consumes."""
        stays = torch.ones(layer.input_size, dtype=torch.bool)
        stays[indices] = False
        kept = stays.nonzero().flatten()
        for key, parameter in list(layer._parameters.items()):
            if parameter is not None and reads_inputs(key):
                _replace(layer, key, parameter.detach().index_select(1, kept.to(parameter.device)))
        layer.input_size = len(kept)
        return layer


def _replace(layer: nn.RNNBase, key: str, values: Tensor) -> None:
    setattr(layer, key, nn.Parameter(values, layer._parameters[key].requires_grad))  # type: ignore[union-attr]
