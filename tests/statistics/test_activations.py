"""What consumers read, captured: shapes, values, gradients through one consumer only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks import Residual, cnn, mlp
from nss_prune.core.models import evaluation
from nss_prune.errors import DataError
from nss_prune.graph.groups import find_neurons
from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.tracing import trace
from nss_prune.statistics.capture import Reading, Watcher


def groups_of(model: nn.Module, inputs: Tensor) -> tuple[NeuronGroup, ...]:
    graph, outputs = trace(model, inputs)
    return find_neurons(model, graph, outputs).groups


def test_readings_are_what_the_readers_read() -> None:
    torch.manual_seed(0)
    model, inputs = cnn().eval(), torch.randn(3, 3, 12, 12).double()
    watcher = Watcher(groups_of(model, inputs), 3)
    with watcher.attached(model), torch.no_grad():
        model(inputs)
    first, second, third = watcher.readings
    assert torch.equal(first.activation, model[:4](inputs).flatten(2))
    flattened = model[:7](inputs)
    assert torch.equal(second.activation, flattened.reshape(3, 10, 16))
    assert torch.equal(third.activation, model[:9](inputs)[:, :, None])


def test_each_group_of_a_concat_gets_its_own_part() -> None:
    torch.manual_seed(0)
    model, inputs = Residual().double().eval(), torch.randn(5, 6).double()
    watcher = Watcher(groups_of(model, inputs), 5)
    with watcher.attached(model), torch.no_grad():
        model(inputs)
    side = [reading for reading in watcher.readings if reading.group == "side"]
    assert len(side) == 1
    assert torch.equal(side[0].activation[:, :, 0], torch.relu(model.side(inputs)))


def test_gradients_flow_through_one_reader_each() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maker, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.maker(inputs)
            return self.left(hidden) + 10 * self.right(hidden)

    torch.manual_seed(0)
    model, inputs = TwoReaders().double(), torch.randn(2, 3).double()
    found: list[tuple[Reading, Tensor]] = []
    groups = groups_of(model, inputs)
    watcher = Watcher(groups, 2, lambda reading, gradient: found.append((reading, gradient)))
    with evaluation(model), watcher.attached(model), torch.enable_grad():
        model(inputs).sum().backward()
    gradients = sorted(gradient[0, :, 0].tolist() for _, gradient in found)
    expected = sorted([model.left.weight[0].tolist(), (10 * model.right.weight[0]).tolist()])
    assert gradients == [pytest.approx(row) for row in expected]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_windows_folded_into_the_batch_become_positions() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            windows = torch.relu(self.embed(inputs)).reshape(-1, 3, 4)
            return self.head(self.mix(windows).reshape(len(inputs), 6, 5).mean(1))

    torch.manual_seed(0)
    model, inputs = Windows().double(), torch.randn(4, 6, 2).double()
    watcher = Watcher([g for g in groups_of(model, inputs) if g.name == "embed"], 4)
    with watcher.attached(model), torch.no_grad():
        model(inputs)
    (reading,) = watcher.readings
    expected = torch.relu(model.embed(inputs)).transpose(1, 2)
    assert torch.equal(reading.activation, expected)


def test_samples_must_lie_along_the_first_axis() -> None:
    model, inputs = mlp(), torch.randn(4, 12).double()
    watcher = Watcher(groups_of(model, inputs), 3)
    with pytest.raises(DataError, match="first axis"), watcher.attached(model):
        model(inputs)
    assert not any(module._forward_pre_hooks for module in model.modules())
