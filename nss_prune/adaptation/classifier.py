"""A classifier that gets outputs for new classes."""

from __future__ import annotations

import torch
from torch import nn

from nss_prune.core.models import submodule


def grow_classifier(model: nn.Module, classifier: str, outputs: int) -> None:
    """Add rows to a Linear classifier that has fewer outputs; any other one stays as it is.

    The rows it has keep their bits; new ones are drawn as those of any new layer. Its parameters
    are replaced, so that :func:`nss_prune.core.undo.restored_on_error` takes the rows away again.
    """
    layer = submodule(model, classifier)
    if not isinstance(layer, nn.Linear) or outputs <= layer.out_features:
        return
    added = nn.Linear(
        layer.in_features,
        outputs - layer.out_features,
        layer.bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    for key, parameter in list(layer.named_parameters(recurse=False)):
        rows = torch.cat([parameter.detach(), added.get_parameter(key).detach()])
        setattr(layer, key, nn.Parameter(rows, requires_grad=parameter.requires_grad))
    layer.out_features = outputs
