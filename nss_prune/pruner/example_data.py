"""The example inputs in the place of data."""

from __future__ import annotations

import warnings
from typing import Any

from nss_prune.core.nested import tensors_in
from nss_prune.pruner.subject import Subject


def example_data(subject: Subject, use: str) -> list[Any]:
    """The example inputs as data of one batch without labels, with a warning.

    Args:
        use: What happens to them.
    """
    inputs = subject.example_inputs
    if isinstance(inputs, (tuple, list)) and len(inputs) == 1:
        inputs = inputs[0]
    warnings.warn(
        f"no data was given: the example inputs ({len(tensors_in(inputs)[0])} sample(s)) are "
        f"{use}; pass data=, batches of (inputs, labels), for slices that hold on other inputs",
        stacklevel=2,
    )
    return [(inputs, None)]
