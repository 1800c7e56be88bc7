"""Which task a sample belongs to, against the formulas in float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nss_prune.adaptation.incremental import IncrementalTrainer
from nss_prune.adaptation.task_inference import DIRECTIONS, LayerFeatures, energy, entropy
from nss_prune.adaptation.tasks import Task
from nss_prune.errors import ArgumentError, DataError
from tests.networks import mlp


def clouds(neurons: int, samples: int = 400, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated activations of several classes around means of their own."""
    torch.manual_seed(0)
    mixing = torch.randn(neurons, neurons, dtype=torch.float64)
    labels = torch.arange(samples) % classes
    means = 3 * torch.randn(classes, neurons, dtype=torch.float64)
    return torch.randn(samples, neurons, dtype=torch.float64) @ mixing + means[labels], labels


def naive_distance(values, labels, sample, directions):
    """Over the neurons' number; all but the ``directions`` largest variances are one."""
    n, classes = values.shape[1], labels.unique().tolist()
    means = [values[labels == c].mean(0) for c in classes]
    covariance = torch.zeros(n, n, dtype=torch.float64)
    for value, label in zip(values, labels.tolist(), strict=True):
        away = value - means[classes.index(label)]
        covariance += torch.outer(away, away) / (len(values) - len(classes))
    variances, vectors = torch.linalg.eigh(covariance)
    shared = variances.clone()
    shared[: n - directions] = variances[: n - directions].mean()
    metric = vectors @ torch.diag(1 / shared) @ vectors.T
    return min(float((sample - mean) @ metric @ (sample - mean)) for mean in means) / n


@pytest.mark.parametrize(("neurons", "kept"), [(7, 6), (DIRECTIONS + 9, DIRECTIONS)])
def test_the_distance_is_mahalanobis_to_the_nearest_mean(neurons: int, kept: int) -> None:
    values, labels = clouds(neurons)
    found = LayerFeatures.of(values, labels, torch.arange(neurons))
    assert len(found.directions) == kept
    samples = 2 * torch.randn(5, neurons, dtype=torch.float64)
    for sample, distance in zip(samples, found.distance(samples), strict=True):
        assert float(distance) == pytest.approx(
            naive_distance(values, labels, sample, kept), rel=1e-4
        )


def test_only_critical_neurons_that_vary_count() -> None:
    values, labels = clouds(9)
    values[:, 4] = 2.5
    found = LayerFeatures.of(values, labels, torch.tensor([1, 4, 6]))
    assert found.neurons.tolist() == [1, 6]
    other = values.clone()
    other[:, [0, 2, 3, 4, 5, 7, 8]] += 100
    torch.testing.assert_close(found.distance(other), found.distance(values))


def test_a_layer_whose_neurons_are_all_constant_says_nothing() -> None:
    values, labels = torch.ones(20, 3, dtype=torch.float64), torch.arange(20) % 2
    found = LayerFeatures.of(values, labels, torch.arange(3))
    assert found.distance(torch.randn(4, 3)).tolist() == [0, 0, 0, 0]


def test_entropy_and_energy_by_their_formulas() -> None:
    scores = torch.randn(6, 5, dtype=torch.float64)
    scores[:, [0, 4]] = float("-inf")
    for row, relative, free in zip(scores, entropy(scores, 3), energy(scores), strict=True):
        total = sum(math.exp(row[c]) for c in (1, 2, 3))
        shares = [math.exp(row[c]) / total for c in (1, 2, 3)]
        assert float(relative) == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(3))
        assert float(free) == pytest.approx(-math.log(total))
    assert entropy(scores, 1).tolist() == [2] * 6


def apart(classes: tuple[int, ...], samples: int = 240) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Classes around means of their own, each far from the others."""
    generator = torch.Generator().manual_seed(len(classes) + classes[0])
    means = 4 * torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    labels = torch.tensor(classes)[torch.arange(samples) % len(classes)]
    noise = torch.randn(samples, 12, dtype=torch.float64, generator=generator)
    return list(zip((means[labels] + noise).split(40), labels.split(40), strict=True))


@pytest.fixture(scope="module")
def learned() -> IncrementalTrainer:
    torch.manual_seed(0)
    model = mlp(hidden=(24, 16), classes=6)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(10):
        for inputs, labels in apart((0, 1, 2)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    trainer = IncrementalTrainer(model, data=apart((0, 1, 2)), keep=0.5, progress=False)
    trainer.fit(apart((3, 4)), epochs=10, learning_rate=0.01)
    return trainer


def test_features_tell_tasks_apart(learned: IncrementalTrainer) -> None:
    for position, classes in enumerate([(0, 1, 2), (3, 4)]):
        inputs = torch.cat([inputs for inputs, _ in apart(classes, 120)])
        for by in ("features", "both"):
            assert (learned.infer_task(inputs, by=by) == position).double().mean() > 0.95
        assert torch.equal(learned.infer_task(inputs), learned.infer_task(inputs, by="both"))


def test_the_scores_of_a_task_stay_while_later_ones_are_learned(
    learned: IncrementalTrainer, tmp_path
) -> None:
    before = learned.tasks[0].features
    with learned.task(0):
        again = type(before).of(learned.model, learned.tasks[0].slice, apart((0, 1, 2)))
    assert again.usual == before.usual
    assert again.usual_energy == before.usual_energy
    learned.tasks[0].save(tmp_path / "task")
    loaded = Task.load(tmp_path / "task").features
    assert (loaded.usual, loaded.usual_energy) == (before.usual, before.usual_energy)
    for name, layer in before.layers.items():
        assert torch.equal(layer.directions, loaded.layers[name].directions)
        assert loaded.layers[name].residual == layer.residual


def test_features_follow_a_training_loop_of_ones_own(learned: IncrementalTrainer) -> None:
    trainer = IncrementalTrainer(
        copy.deepcopy(learned.model), tasks=learned.tasks, head=learned.head, progress=False
    )
    first, last = trainer.tasks
    inputs, labels = apart((3, 4))[0]
    optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    with last.masked(trainer.model), trainer.masked_freezing(inputs).attach(optimizer):
        nn.functional.cross_entropy(trainer.model(inputs), labels).backward()
        optimizer.step()
    trainer.update_features(apart((3, 4)))
    assert trainer.tasks[0] is first
    found = trainer.tasks[1].features
    assert found.usual != last.features.usual
    with trainer.task(1, masked=True):
        again = type(found).of(trainer.model, last.slice, apart((3, 4)))
    assert (found.usual, found.usual_energy) == (again.usual, again.usual_energy)
    with pytest.raises(DataError, match="only once"):
        trainer.update_features(iter(apart((3, 4))))


def test_a_task_without_data_is_told_by_its_outputs(learned: IncrementalTrainer) -> None:
    tasks = [replace(task, features=None) for task in learned.tasks]
    without = IncrementalTrainer(learned.model, tasks=tasks, progress=False)
    inputs = apart((3, 4))[0][0]
    assert torch.equal(without.infer_task(inputs), learned.infer_task(inputs, by="entropy"))
    with pytest.raises(ArgumentError, match="data of 'task 1' was not given"):
        without.predict(inputs, by="features")
    with pytest.raises(ArgumentError, match="use one of"):
        without.predict(inputs, by="nearest")
