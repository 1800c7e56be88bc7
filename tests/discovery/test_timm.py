"""Models of timm, small ones: each way in which torch-pruning fails alone, and timm's own toys."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

from nss_prune import NSSPruner

CLASSES = 3

# What torch-pruning's standard recipe does with the model, the model, its arguments, its picture.
FAILURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ZeroDivisionError while building": (
        "hiera_tiny_224", {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}, 224,
    ),
    "ZeroDivisionError in windows": (
        "twins_svt_small",
        {"embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1)}, 64,
    ),
    "IndexError in separate q, k and v": (
        "cait_xxs24_224", {"depth": 1, "img_size": 64, "embed_dim": 32, "num_heads": 2}, 64,
    ),
    "IndexError in a table of positions": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56}, 56,
    ),
    "IndexError in recurrent layers": (
        "sequencer2d_s",
        {"layers": (1, 1, 1, 1), "embed_dims": (12, 24, 24, 24), "hidden_sizes": (4, 6, 6, 6),
         "img_size": 56}, 56,
    ),
    "stale attribute of attention": ("xcit_nano_12_p8_224", {"depth": 1, "img_size": 64}, 64),
    "auxiliary tensor of a blurring pool": ("resnetblur18", {}, 64),
    "search without end": ("test_coatnet", {}, 160),
}  # fmt: skip


def pruned(model: nn.Module, size: tuple[int, ...], **arguments: Any) -> NSSPruner:
    """The pruner after a step to 70 % of the parameters; the model then trains."""
    inputs = torch.randn(8, *size)
    data = [(inputs, torch.arange(8) % 2)]
    pruner = NSSPruner(
        model, inputs[:2], params_budget=0.7, data=data, progress=False, timeout=9, **arguments
    )
    pruner.step()
    report = pruner.report
    assert report is not None
    assert report.after.parameters < report.before.parameters
    share = report.after.parameters / report.before.parameters
    assert abs(share - 0.7) < 0.01 or any("the budget is" in note for note in report.notes)
    assert model.eval()(inputs).shape == (8, CLASSES)
    model.train()(inputs).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    return pruner


@pytest.mark.parametrize("failure", FAILURES)
def test_where_torch_pruning_fails(failure: str) -> None:
    name, arguments, size = FAILURES[failure]
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    pruned(timm.create_model(name, num_classes=CLASSES, **arguments), (3, size, size))


@pytest.mark.parametrize("name", timm.list_models("test_*", exclude_filters="test_coatnet"))
def test_toys_of_every_kind(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    pruned(model, model.pretrained_cfg["input_size"])


@pytest.mark.parametrize("fused", [True, False])
def test_attention_fused_or_not(fused: bool) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=CLASSES)
    for block in model.blocks:
        block.attn.fused_attn = fused
    pruner = pruned(model, model.pretrained_cfg["input_size"])
    heads = [row for row in pruner.report.rows if row.layer.endswith("qkv")]
    # Older versions of timm reshape to the width of the input, which fewer heads do not have.
    assert all(row.unit == "heads" or "does not run" in row.reason for row in heads)


def test_exported_after_pruning() -> None:
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=CLASSES)
    size = (3, 64, 64)
    pruned(model, size)
    inputs = torch.randn(2, *size)
    exported = torch.export.export(model.eval(), (inputs,)).module()
    torch.testing.assert_close(exported(inputs), model(inputs))


def test_a_bfloat16_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=CLASSES).bfloat16()
    inputs = torch.randn(8, 3, 64, 64).bfloat16()
    pruner = NSSPruner(model, inputs[:2], theta=0.5, data=[(inputs, torch.arange(8) % 2)])
    pruner.step()
    assert pruner.report.after.parameters < pruner.report.before.parameters
    assert model(inputs).dtype == torch.bfloat16


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_heads_by_ratio(own: bool, together: bool) -> None:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=CLASSES
    ).eval()
    inputs = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[2 * 8 : 3 * 8] *= 1e-3  # a query, key and value of little
        model.blocks[1].attn.qkv.weight[32 + 2 * 8 : 32 + 3 * 8] *= 1e-3
        model.blocks[1].attn.qkv.weight[64 + 2 * 8 : 64 + 3 * 8] *= 1e-3
    pruner = NSSPruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2) if own else None,
        data=[(inputs, torch.arange(8) % 2)],
        pruning_ratio=0.0,
        prune_num_heads=True,
        head_pruning_ratio=0.5,
        global_pruning=together,
        num_heads={block.attn.qkv: 4 for block in model.blocks},
    )
    pruner.step()
    left = [block.attn.num_heads for block in model.blocks]
    if not any(row.unit == "heads" for row in pruner.report.rows):
        pytest.skip("this version of timm cannot take fewer heads")
    assert sum(left) == 6
    assert together or left == [2, 2, 2]
    for block in model.blocks:  # as torch-pruning's script for timm does
        block.attn.num_heads = pruner.num_heads[block.attn.qkv]
        block.attn.head_dim = block.attn.qkv.out_features // (3 * block.attn.num_heads)
    assert model(inputs).shape == (8, CLASSES)
    assert not pruner.slice.kept["blocks.1.attn.qkv"][2]
