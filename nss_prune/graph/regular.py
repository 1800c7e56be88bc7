"""Whether channels go through a call as wholes, in ways that torch-pruning follows rightly."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch import nn

from nss_prune.graph.axes import side_width
from nss_prune.graph.groups import GRAPH_OPERATIONS
from nss_prune.graph.neurons import Side

PASSED_ON = (
    "Add", "Sub", "Mul", "Div", "Neg", "Relu", "LeakyRelu", "PreluKernel", "Elu", "Silu", "Gelu",
    "Mish", "Sigmoid", "Tanh", "Hardsigmoid", "Hardswish", "Hardtanh", "Softplus", "Clamp", "Pow",
    "Sqrt", "Exp", "NativeBatchNorm", "CudnnBatchNorm", "AvgPool2D", "AdaptiveAvgPool2D",
    "MeanBackward1", "MaxPool2DWithIndices", "NativeDropout", "ConstantPadNd", "UpsampleNearest2D",
    "UpsampleBilinear2D", "TBackward0",
)  # fmt: skip
"""Beginnings of the names of operations that leave the channels of a map where they are.

``mean`` is the one over axes that keep their places; ``t`` is that of a Linear layer's weights.
"""

LAYERS = {
    tp.ops.OPTYPE.CONV,
    tp.ops.OPTYPE.DEPTHWISE_CONV,
    tp.ops.OPTYPE.LINEAR,
    tp.ops.OPTYPE.BN,
    tp.ops.OPTYPE.GN,
    tp.ops.OPTYPE.PRELU,
    tp.ops.OPTYPE.OUTPUT,
}


def keeps_channels_whole(graph: Any) -> bool:
    """Whether all operations of torch-pruning's graph are known to keep channels whole.

    A map may be flattened before Linear layers. Whatever is not known here may divide channels.
    """
    return all(_keeps(node) for node in graph.module2node.values())


def _keeps(node: Any) -> bool:
    if node.type == tp.ops.OPTYPE.RESHAPE:
        return all(isinstance(after.module, nn.Linear) for after in node.outputs)
    if node.type != tp.ops.OPTYPE.ELEMENTWISE:
        return node.type in LAYERS
    name: str = str(node.module).rpartition("(")[2].rstrip(")")
    return name.startswith(PASSED_ON)


def maps_rightly(graph: tp.DependencyGraph, layer: nn.Module, channels: int) -> bool:
    """Whether torch-pruning asks layers for channels that they have, where those of one go.

    Args:
        layer: Its output channels go.
        channels: Their number.
    """
    function = graph.get_pruner_of_module(layer).prune_out_channels
    try:
        group = graph.get_pruning_group(layer, function, list(range(channels)))
    except Exception:  # of its index mappings
        return False
    for dependency, found in group:
        node = dependency.target
        side: Side = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
        if node.type in GRAPH_OPERATIONS:
            continue
        width = side_width(node.module, side, node.pruning_dim)
        if width is not None and found and max(found) >= width:
            return False
    return True
