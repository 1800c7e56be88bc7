"""Whether a call of a model depends on the values of tensors, and not on their shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class ValueReads(TorchDispatchMode):
    """Within the context, operations are watched for those whose result tells of values.

    Attributes:
        found: Whether there was one, such as the truth of a tensor, or an index by a mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        self.found = self.found or not READING.isdisjoint(function.tags)
        return function(*arguments, **(keywords or {}))
