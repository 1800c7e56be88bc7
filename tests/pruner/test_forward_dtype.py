"""Mixed precision in the passes over the data: near to what full precision gives."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from networks import batches, cnn, mlp
from nss_prune import NSSPruner
from nss_prune.errors import ArgumentError

SHAPES: dict[str, tuple[int, ...]] = {"mlp": (12,), "cnn": (3, 12, 12), "vit": (3, 12, 12)}


def made(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    if name == "vit":
        model: nn.Module = timm.models.VisionTransformer(
            img_size=12, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=3
        )
    else:
        model = {"mlp": mlp, "cnn": cnn}[name]()
    data = batches(96, SHAPES[name], 3, size=16)
    return model.float().eval(), [(inputs.float(), labels) for inputs, labels in data]


def pruner_of(name: str, **settings: Any) -> tuple[NSSPruner, list[Any]]:
    """A pruner, and the dtypes of what the model's last linear layer gave in its passes."""
    model, data = made(name)
    seen: list[Any] = []
    pruner = NSSPruner(model, data[0][0][:2], data=data, **settings)
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    last.register_forward_hook(lambda layer, given, output: seen.append(output.dtype))
    return pruner, seen


@pytest.mark.parametrize("name", SHAPES)
def test_eliminations_are_near(name: str) -> None:
    found = {}
    for dtype in (None, torch.bfloat16):
        pruner, seen = pruner_of(name, params_budget=0.6, forward_dtype=dtype)
        found[dtype] = pruner.evidence.eliminations
        assert (torch.bfloat16 in seen) == (dtype is not None)
    for layer, whole in found[None].items():
        lower = found[torch.bfloat16][layer]
        assert lower.divergence.dtype == torch.float64
        error = (lower.divergence - whole.divergence).norm() / whole.divergence.norm()
        assert 0 < error < 0.05, layer


def test_contributions_are_near_and_weights_stay() -> None:
    whole, _ = pruner_of("mlp", theta=0.9)
    lower, seen = pruner_of("mlp", theta=0.9, forward_dtype=torch.bfloat16)
    for layer, values in whole.profile.overall["taylor"].items():
        other = lower.profile.overall["taylor"][layer]
        assert (other - values).norm() < 0.02 * values.norm()
        assert not torch.equal(other, values)
    lower.step()
    assert torch.bfloat16 in seen
    assert {value.dtype for value in lower.model.parameters()} == {torch.float32}
    assert lower.report is not None


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="forward_dtype"):
        pruner_of("mlp", theta=0.9, forward_dtype=torch.float16)
