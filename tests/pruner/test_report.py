"""Costs by torch's own operator counts, and a report that can be read."""

from __future__ import annotations

import pickle
from itertools import pairwise

import timm
import torch
import torch_pruning as tp
import torchvision
from torch import nn

from nss_prune import NSSPruner
from nss_prune.graph.costs import Cost, LateCost, measure
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
    assert len(repr(report)) < 200
    assert "1 of 2 layers pruned, 1 left alone" in repr(report)
    page = report._repr_html_()
    assert page.count("<tr>") == 3
    assert "makes the model&#x27;s output" in page


class Unseen(nn.Module):
    """A trunk that runs without gradients, and a head that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(20).flip(0))
        self.trunk = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.hidden, self.last = nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if bool((inputs != 0).any()):
            inputs = inputs[:, self.order]
        with torch.no_grad():
            features = self.trunk(inputs)
        return self.last(torch.relu(self.hidden(features)))


def test_costs_of_a_model_that_branches_on_values_and_rows_of_what_was_not_followed() -> None:
    torch.manual_seed(0)
    model, inputs = Unseen(), torch.randn(64, 20)
    data = [(inputs, torch.arange(64) % 5)]
    pruner = NSSPruner(model, inputs[:2], params_budget=0.8, data=data)
    pruner.step()
    width = model.hidden.out_features
    assert width < 32
    assert pruner.report.before.macs == 2 * (20 * 64 + 64 * 64 + 64 * 32 + 32 * 5)
    assert pruner.report.after.macs == 2 * (20 * 64 + 64 * 64 + 64 * width + width * 5)
    rows = {row.layer: row for row in pruner.report.rows}
    assert list(rows) == ["trunk.0", "trunk.2", "hidden", "last"]
    assert (rows["trunk.0"].before, rows["trunk.0"].after) == (64, 64)
    assert "no_grad" in rows["trunk.2"].reason


def test_a_ratio_that_falls_short_is_said() -> None:
    torch.manual_seed(0)
    model, inputs = Unseen().trunk, torch.randn(64, 20)
    data = [(inputs, torch.arange(64) % 5)]
    pruner = NSSPruner(model, inputs, data=data, pruning_ratio=0.8, max_pruning_ratio=0.5)
    pruner.step()
    assert "50.0% of the channels are removed, pruning_ratio asks for 80.0%" in str(pruner.report)
    model = Unseen().trunk
    pruner = NSSPruner(model, inputs, data=data, pruning_ratio=0.5)
    pruner.step()
    assert "pruning_ratio asks" not in str(pruner.report)


def test_macs_are_counted_once_when_they_are_read() -> None:
    counts = []
    late = LateCost(3, lambda: counts.append(1) or 7)  # type: ignore[func-returns-value]
    assert (late.parameters, counts) == (3, [])
    assert late == Cost(3, 7)
    assert Cost(3, 7) == late
    assert late != Cost(3, 8)
    assert hash(late) == hash(Cost(3, 7))
    assert type(pickle.loads(pickle.dumps(late))) is Cost
    assert counts == [1]


def test_macs_are_those_of_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4), torch.nn.Linear(4, 3)
    )
    pruner = NSSPruner(
        model,
        torch.randn(2, 6),
        tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        iterative_steps=2,
    )
    widths = [(8, 4)]
    for _ in range(2):
        pruner.step()
        widths.append((model[0].out_features, model[2].out_features))
    costs = [2 * (6 * a + a * b + b * 3) for a, b in widths]
    steps = pruner.cumulative_report.steps
    assert [(step.before.macs, step.after.macs) for step in steps] == [*pairwise(costs)]
    assert widths[-1] == (4, 2)
