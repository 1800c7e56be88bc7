"""Models that torch-pruning cannot follow as a whole are pruned in parts."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from networks import assert_unchanged, cnn, fingerprint
from nss_prune import NSSPruner, profile
from nss_prune.discovery.whole import discover
from nss_prune.errors import GraphError, NothingToPruneError
from nss_prune.graph.groups import find_neurons
from nss_prune.graph.tracing import trace


class Untraceable(nn.Module):
    """Does not run while autograd follows its weights, as torch-pruning needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.inner[0].weight.requires_grad:
            raise RuntimeError("no gradients here")
        return self.inner(inputs) + inputs


class Blocks(nn.Module):
    """Untraceable, then blocks that take keywords, work in place and are called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Untraceable()
        self.blocks = nn.ModuleList([Gated(), Gated()])
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(block(hidden, shift=1.0), shift=2.0)
        return self.head(hidden)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, inputs: torch.Tensor, *, shift: float) -> torch.Tensor:
        inputs.add_(shift)
        return self.down(torch.relu(self.up(inputs)))


def test_parts_are_found_where_the_whole_is_not() -> None:
    torch.manual_seed(0)
    model = Blocks().double()
    before = fingerprint(model)
    inputs = torch.randn(2, 6).double()
    found = discover(model, inputs)
    assert_unchanged(model, before)
    assert [group.name for group in found.groups] == ["first.inner.0", "blocks.0.up", "blocks.1.up"]
    assert [group.size for group in found.groups] == [12, 10, 10]
    assert found.left_alone["blocks.0.down"] == "crosses a part"
    (note,) = found.notes
    assert "no gradients here" in note


def test_a_whole_that_can_be_traced_stays_whole() -> None:
    model, inputs = cnn(), torch.randn(2, 3, 12, 12).double()
    found = discover(model, inputs)
    graph, nodes = trace(model, inputs)
    expected = find_neurons(model, graph, nodes)
    assert [group.name for group in found.groups] == [group.name for group in expected.groups]
    assert found.notes == ()


def test_ignored_layers_stay_in_parts_too() -> None:
    model = Blocks().double()
    found = discover(model, torch.randn(2, 6).double(), [model.blocks[0]])
    assert [group.name for group in found.groups] == ["first.inner.0", "blocks.1.up"]


def test_nothing_but_untraceable() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(NothingToPruneError):
        discover(model, torch.randn(2, 4))
    with pytest.raises(GraphError, match="does not run on the example inputs"):
        discover(model, torch.randn(2, 5))


def test_pruned_in_parts_and_steps() -> None:
    torch.manual_seed(0)
    model = Blocks().double()
    inputs = torch.randn(40, 6).double()
    data = [(inputs, torch.arange(40) % 3)]
    pruner = NSSPruner(model, inputs[:2], params_budget=0.6, data=data, iterative_steps=2)
    whole = sum(p.numel() for p in model.parameters())
    with pytest.raises(GraphError, match="call step"):
        pruner.step(interactive=True)
    pruner.step()
    assert any("no gradients here" in note for note in pruner.report.notes)
    pruner.step()
    assert any("no gradients here" in note for note in pruner.report.notes)
    assert sum(p.numel() for p in model.parameters()) <= 0.6 * whole
    assert any("in parts" in note for note in pruner.report.notes)
    with torch.no_grad():
        assert model(inputs).shape == (40, 3)


@pytest.mark.parametrize(
    "arguments", [{"pruning_ratio": 0.5}, {"importance": lambda group: None, "pruning_ratio": 0.5}]
)
def test_what_needs_the_whole_graph_says_so(arguments) -> None:
    model = Blocks().double()
    before = fingerprint(model)
    with pytest.raises(GraphError, match="no gradients here"):
        NSSPruner(model, torch.randn(2, 6).double(), **arguments)
    assert_unchanged(model, before)


@pytest.mark.skipif(not timm.is_model("test_coatnet"), reason="this timm has no test_coatnet")
def test_a_search_without_end_is_cut_off() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_coatnet", num_classes=3).eval()
    size = model.pretrained_cfg["input_size"]
    found = discover(model, torch.randn(1, *size), timeout=6, adapters=())
    assert any("busy with" in note for note in found.notes)
    assert found.groups


def test_profile_of_parts() -> None:
    torch.manual_seed(0)
    model = Blocks().double()
    inputs = torch.randn(40, 6).double()
    result = profile(model, [(inputs, torch.arange(40) % 3)], metrics=("avg",))
    assert list(result.layers) == ["first.inner.0", "blocks.0.up", "blocks.1.up"]


def test_what_is_made_outside_is_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )
    found = discover(model, torch.randn(2, 4, 6, 6))
    assert [group.name for group in found.groups] == ["1"]
    assert found.left_alone["0"] == "made outside of what is traced"
