"""The plugin does in Avalanche what the trainer does alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nss_prune.errors import ArgumentError

pytest.importorskip("avalanche")

from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.supervised import Naive

from nss_prune.adaptation.avalanche import NeuSemSlicePlugin

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning")


class Labelled(TensorDataset):
    """What Avalanche asks of a data set."""

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        patterns = torch.randn(6, 12, generator=torch.Generator().manual_seed(7))
        self.targets = (torch.arange(samples) % 6).tolist()
        inputs = patterns[self.targets] + 0.3 * torch.randn(samples, 12, generator=generator)
        super().__init__(inputs, torch.tensor(self.targets))


def scenario() -> Any:
    return nc_benchmark(
        as_classification_dataset(Labelled(96, 0)),
        as_classification_dataset(Labelled(48, 1)),
        n_experiences=3,
        task_labels=False,
        shuffle=False,
        class_ids_from_zero_from_first_exp=False,
    )


def strategy_with(plugin: NeuSemSlicePlugin, *others: Any) -> Naive:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU())
    model.append(nn.Linear(24, 6))
    return Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=10,
        eval_mb_size=8,
        plugins=[plugin, *others],
        evaluator=EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
    )


@torch.no_grad()
def scores(plugin: NeuSemSlicePlugin, task: int, inputs: Tensor) -> Tensor:
    assert plugin.trainer is not None
    with plugin.trainer.task(task, masked=True) as model:
        return model(inputs)[:, list(plugin.trainer.tasks[task].classes)].clone()


def test_experiences_keep_their_logits_to_the_bit_and_are_told_apart_in_evaluation() -> None:
    plugin = NeuSemSlicePlugin(theta=0.95, progress=False)
    strategy, benchmark = strategy_with(plugin), scenario()
    inputs = torch.randn(9, 12)
    known = []
    for experience in benchmark.train_stream:
        strategy.train(experience)
        known.append(scores(plugin, len(known), inputs))
        for task, expected in enumerate(known):
            assert torch.equal(scores(plugin, task, inputs), expected)
    accuracies = strategy.eval(benchmark.test_stream)
    assert len(accuracies) == 3
    assert all(value > 0.9 for value in accuracies.values())
    assert not any(module._forward_hooks for module in strategy.model.modules())
    assert plugin.trainer is not None
    assert [task.classes for task in plugin.trainer.tasks] == [(0, 1), (2, 3), (4, 5)]


def test_it_works_beside_replay() -> None:
    plugin = NeuSemSlicePlugin("all", theta=0.95, progress=False)
    strategy, benchmark = strategy_with(plugin, ReplayPlugin(mem_size=48)), scenario()
    for experience in benchmark.train_stream:
        strategy.train(experience)
    strategy.model.eval()
    data = Labelled(48, 1)
    right = strategy.model(data.tensors[0]).argmax(1) == data.tensors[1]
    assert right.float().mean() > 0.9


def test_a_loss_that_is_not_known() -> None:
    with pytest.raises(ArgumentError, match="'task' or 'all'"):
        NeuSemSlicePlugin("none")  # type: ignore[arg-type]
