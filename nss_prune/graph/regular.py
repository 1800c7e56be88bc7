"""Whether channels go through a call as wholes, in ways that torch-pruning follows rightly."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch import nn

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
