"""Models of libraries around torch, small and with random weights, within a budget.

segmentation_models_pytorch, open_clip_torch and ultralytics; what is not installed is skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from nss_prune import NSSPruner
from nss_prune.core.models import call_model
from nss_prune.core.nested import tensors_in

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

BUDGET = 0.7
PICTURE = (1, 3, 64, 64)
Made = tuple[nn.Module, Any]


def segmentation(name: str) -> Callable[[], Made]:
    def make() -> Made:
        library = pytest.importorskip("segmentation_models_pytorch")
        made: nn.Module = getattr(library, name)("resnet18", encoder_weights=None, classes=3)
        return made, torch.randn(*PICTURE)

    return make


def open_clip() -> Made:
    """A tower of pictures beside one of words, each with nn.MultiheadAttention."""
    library = pytest.importorskip("open_clip")
    pictures = library.CLIPVisionCfg(layers=2, width=48, head_width=12, patch_size=8, image_size=32)
    words = library.CLIPTextCfg(context_length=8, vocab_size=100, width=48, heads=4, layers=2)
    made: nn.Module = library.CLIP(embed_dim=32, vision_cfg=pictures, text_cfg=words)
    return made, (torch.randn(2, 3, 32, 32), torch.randint(1, 99, (2, 8)))


def yolo() -> Made:
    """A detector of C2f blocks with heads at three sizes."""
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    made: nn.Module = tasks.DetectionModel("yolov8n.yaml", ch=3, nc=4, verbose=False)
    return made, torch.randn(*PICTURE)


MODELS: dict[str, Callable[[], Made]] = {
    "unet": segmentation("Unet"),
    "fpn": segmentation("FPN"),
    "deeplabv3plus": segmentation("DeepLabV3Plus"),
    "open_clip": open_clip,
    "yolov8n": yolo,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_is_met(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model.eval()
    whole = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        before = tensors_in(call_model(model, inputs))
    criterion = tp.importance.GroupMagnitudeImportance()
    pruner = NSSPruner(model, inputs, criterion, params_budget=BUDGET, round_to=1, timeout=300)
    pruner.step()
    left = sum(parameter.numel() for parameter in model.parameters())
    assert abs(left / whole - BUDGET) <= 0.01 * BUDGET
    after = tensors_in(call_model(model, inputs))
    scores = [one for one in after if one.requires_grad]
    assert scores
    torch.stack([one.sum() for one in scores]).sum().backward()
    if name != "yolov8n":  # which returns the maps that its heads read as well
        assert [one.shape for one in after] == [one.shape for one in before]
    assert after[0].shape == before[0].shape
