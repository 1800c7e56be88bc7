"""The head: the layer that makes the outputs, one for each class."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from nss_prune.core.models import submodule
from nss_prune.errors import ArgumentError, ModelMismatchError


def find_head(model: nn.Module, head: nn.Module | str | None = None) -> str:
    """The qualified name of the head.

    Args:
        head: The layer or its name; by default the last Linear layer, or the last convolution
            where there is none.

    Raises:
        ModelMismatchError: The model does not have it.
        ArgumentError: The model has no such layer.
    """
    named: dict[str, nn.Module] = dict(model.named_modules())
    if isinstance(head, str):
        submodule(model, head)
        return head
    if head is not None:
        names = [name for name, module in named.items() if module is head]
        if not names:
            raise ModelMismatchError(
                f"head is a {type(head).__name__} that is not in the model; pass its own layer"
            )
        return names[0]
    for kind in (nn.Linear, nn.modules.conv._ConvNd):
        names = [name for name, module in named.items() if isinstance(module, kind)]
        if names:
            return names[-1]
    raise ArgumentError("the model has no Linear or convolution layer; name its head with head=")


def outputs_of(model: nn.Module, head: str) -> int:
    """How many outputs a head has."""
    return int(submodule(model, head).get_parameter("weight").shape[0])


@contextlib.contextmanager
def grown(model: nn.Module, head: str, outputs: int) -> Iterator[None]:
    """Add rows to a Linear head that has fewer outputs; take them away if the body raises.

    The rows it has keep their bits; new ones are drawn as those of any new layer.
    """
    layer = submodule(model, head)
    if not isinstance(layer, nn.Linear) or outputs <= layer.out_features:
        yield
        return
    parameters, width = dict(layer._parameters), layer.out_features
    try:
        _add_rows(layer, outputs - width)
        yield
    except BaseException:
        layer._parameters.update(parameters)
        layer.out_features = width
        raise


def _add_rows(layer: nn.Linear, count: int) -> None:
    added = nn.Linear(
        layer.in_features,
        count,
        layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    for key, parameter in list(layer.named_parameters(recurse=False)):
        rows = torch.cat([parameter.detach(), added.get_parameter(key).detach()])
        setattr(layer, key, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    layer.out_features += count
