"""Costs by torch's own operator counts, and a report that can be read."""

from __future__ import annotations

import timm
import torch
import torchvision
from torch import nn

from nss_prune.graph.costs import Cost, measure
from nss_prune.pruner.report import Report, Row


def test_macs_of_known_models() -> None:
    resnet = measure(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
    assert resnet.parameters == 11_689_512
    assert abs(resnet.macs / 1.814e9 - 1) < 0.01  # torchvision's documented figure


def test_macs_of_attention_and_of_subclassed_layers() -> None:
    class OwnLinear(nn.Linear):
        pass

    assert measure(OwnLinear(6, 5), torch.zeros(3, 6)).macs == 90
    vit = timm.create_model("vit_tiny_patch16_224")
    tokens, width = 197, 192
    expected = 196 * 768 * width + 1000 * width
    expected += 12 * (tokens * 12 * width**2 + 2 * tokens**2 * width)
    assert abs(measure(vit, torch.zeros(1, 3, 224, 224)).macs / expected - 1) < 0.01


def test_measuring_leaves_the_model_in_its_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    measure(model, {"input": torch.zeros(2, 4)})
    assert model.training


def test_text() -> None:
    report = Report(
        (Row("conv1", 64, 10), Row("fc", 1000, 1000, "makes the model's output")),
        Cost(1000, 5000),
        Cost(250, 1000),
        ("three categories were small",),
    )
    text = str(report)
    lines = text.splitlines()
    assert lines[1].split() == ["conv1", "64", "10"]
    assert lines[2].startswith("fc")
    assert lines[2].endswith("makes the model's output")
    assert "parameters: 1,000 -> 250 (75.0% gone)" in text
    assert "MACs: 5,000 -> 1,000 (80.0% gone)" in text
    assert "note: three categories were small" in text
