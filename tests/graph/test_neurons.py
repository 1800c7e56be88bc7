"""Groups read off torch-pruning's graph: who makes, who reads, what is left alone and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from networks import Residual, cnn, mlp
from nss_prune.errors import ArgumentError, GraphError, NothingToPruneError
from nss_prune.graph.groups import find_neurons, refuse_nothing
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.tracing import resolve_layers, trace


def neurons_of(model: nn.Module, *shape: int, ignored: tuple[object, ...] = ()) -> NeuronMap:
    graph, outputs = trace(model, torch.randn(2, *shape).double())
    return find_neurons(model, graph, outputs, resolve_layers(model, ignored))


def test_a_flatten_repeats_each_neuron() -> None:
    found = {group.name: group for group in neurons_of(cnn(), 3, 12, 12).groups}
    assert list(found) == ["0", "4", "7"]
    (consumer,) = found["4"].consumers
    assert consumer.name == "7"
    assert consumer.width == 160
    assert consumer.channels.tolist() == list(range(160))
    assert consumer.neurons.tolist() == [n for n in range(10) for _ in range(16)]


def test_a_concat_shifts_and_a_norm_passes_on() -> None:
    groups = neurons_of(Residual().double(), 6).groups
    stream = next(g for g in groups if {"stem", "down"} & {m.name for m in g.members})
    sides = {(member.name, member.side) for member in stream.members}
    assert {("stem", "out"), ("down", "out"), ("norm", "both"), ("up", "in"), ("head", "in")} == (
        sides
    )
    (side,) = next(g for g in groups if g.name == "side").consumers
    assert side.channels.tolist() == list(range(12, 19))


def test_output_layers_are_left_alone_without_being_named() -> None:
    found = neurons_of(mlp(), 12)
    assert found.left_alone == {"5": "makes the model's output"}
    assert found.left_alone_sizes == {"5": 3}


def test_an_output_that_is_also_read_is_left_alone() -> None:
    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = torch.relu(self.second(torch.relu(self.first(inputs))))
            return features, self.head(features)

    found = neurons_of(TwoOutputs().double(), 6)
    assert [group.name for group in found.groups] == ["first"]
    assert set(found.left_alone) == {"second", "head"}


def test_grouped_convolutions_and_group_norms_tie_channels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 6, 1),
        nn.GroupNorm(2, 6),
        nn.Conv2d(6, 5, 1),
        nn.Conv2d(5, 2, 1),
    ).double()
    found = neurons_of(model, 3, 8, 8)
    sizes = {group.name: (group.size, group.ties) for group in found.groups}
    assert sizes == {"0": (4, 2), "1": (4, 2), "2": (3, 2), "4": (5, 1)}
    (maker, consumer) = found.groups[0].members
    assert (maker.name, maker.side, consumer.name, consumer.side) == ("0", "out", "1", "in")
    # Neuron n is the channels n and n + 4, one for each half of the convolution.
    assert maker.neurons.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert maker.channels.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_ties_that_cannot_be_kept_are_left_alone() -> None:
    multiplied = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 2, 1)
    ).double()
    found = neurons_of(multiplied, 3, 8, 8)
    assert [group.name for group in found.groups] == ["2"]
    assert "8 groups" in found.left_alone["0"]
    assert "8 groups" in found.left_alone["1"]


def test_depthwise_convolutions_pass_neurons_on() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)
    ).double()
    (group,) = neurons_of(model, 3, 8, 8).groups
    assert {(member.name, member.side) for member in group.members} == {
        ("0", "out"),
        ("1", "both"),
        ("2", "in"),
    }


@pytest.mark.parametrize("ignored", ["2", nn.Linear])
def test_ignored_by_name_and_type(ignored: object) -> None:
    model = nn.Sequential(nn.Conv1d(2, 5, 1), nn.Flatten(), nn.Linear(15, 4), nn.Linear(4, 2))
    found = neurons_of(model.double(), 2, 3, ignored=(ignored,))
    assert [group.name for group in found.groups] == ["0"]
    assert found.left_alone["2"] == "ignored"


def test_ignoring_a_block_ignores_what_is_in_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.ReLU()), nn.Linear(5, 3)).double()
    with pytest.raises(NothingToPruneError, match=r"0\.0: ignored"):
        refuse_nothing(neurons_of(model, 4, ignored=("0",)))


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(ArgumentError, match="named_modules"):
        resolve_layers(mlp(), ["head"])


def test_tracing_leaves_the_model_as_found_even_when_it_fails() -> None:
    model = mlp().train()
    model[1].weight.requires_grad_(False)
    with pytest.raises(GraphError):
        trace(model, torch.randn(2, 5).double())
    assert model.training
    assert not model[1].weight.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_models_can_be_traced_under_no_grad() -> None:
    model = mlp().requires_grad_(False)
    with torch.no_grad():
        assert len(neurons_of(model, 12).groups) == 2
    assert not any(parameter.requires_grad for parameter in model.parameters())
