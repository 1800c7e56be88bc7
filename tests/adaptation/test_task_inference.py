"""Which task a sample belongs to, against the formulas in float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from nss_prune.adaptation.incremental import IncrementalTrainer
from nss_prune.adaptation.task_inference import (
    DIMENSIONS,
    ClassMeans,
    TaskFeatures,
    energy,
    entropy,
    projection,
    separation,
    share_of_energy,
    shrinkage,
)
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


def naive_shrinkage(values):
    """Ledoit and Wolf: b^2 / d^2, by a loop over samples."""
    n, p = len(values), len(values[0])
    covariance = sum(torch.outer(value, value) for value in values) / n
    mean = float(covariance.trace()) / p
    away = float((covariance - mean * torch.eye(p, dtype=torch.float64)).square().sum()) / p
    error = sum(float((torch.outer(v, v) - covariance).square().sum()) for v in values) / n**2 / p
    return min(error, away) / away


def naive_metric(projected, labels):
    """Means, and the root of the inverse covariance within a class, of mean variance 1."""
    n, classes = len(projected[0]), labels.unique().tolist()
    means = []
    for c in classes:
        own = [p for p, label in zip(projected, labels.tolist(), strict=True) if label == c]
        means.append(sum(own) / len(own))
    covariance = torch.zeros(n, n, dtype=torch.float64)
    for value, label in zip(projected, labels.tolist(), strict=True):
        away = value - means[classes.index(label)]
        covariance += torch.outer(away, away) / (len(projected) - len(classes))
    variance = sum(float(covariance[i, i]) for i in range(n)) / n
    covariance /= variance
    aways = [v - means[classes.index(c)] for v, c in zip(projected, labels.tolist(), strict=True)]
    share = max(naive_shrinkage(aways), 1e-3)
    covariance *= 1 - share
    for i in range(n):
        covariance[i, i] += share
    return means, torch.linalg.inv(torch.linalg.cholesky(covariance)), math.sqrt(variance)


def signs_of(neurons: int) -> torch.Tensor:
    """One in float64, over the root of the neurons, or the identity of no more than dimensions."""
    if neurons <= DIMENSIONS:
        return torch.diag(torch.ones(neurons, dtype=torch.float64))
    found = projection(neurons)
    assert torch.equal(found.abs(), torch.full_like(found, neurons**-0.5))
    assert abs(float(found.mean())) < 0.01
    return found


@pytest.mark.parametrize("neurons", [7, DIMENSIONS + 9])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
def test_the_distance_is_mahalanobis_to_the_nearest_mean(neurons: int, size: float) -> None:
    values, labels = clouds(neurons)
    found = ClassMeans.of(size * values, labels)
    assert found.means.shape == (3, min(neurons, DIMENSIONS))
    assert found.whitening.dtype == torch.int8
    signs = signs_of(neurons)
    means, metric, deviation = naive_metric(list(size * values @ signs), labels)
    in_8_bits = found.whitening.double() * found.steps.double()[:, None]
    for row, wanted in zip(in_8_bits, metric, strict=True):
        assert float((row - wanted).abs().max()) <= 0.501 * float(wanted.abs().max()) / 127
    samples = 2 * size * torch.randn(3, neurons, dtype=torch.float64)
    for sample, distance in zip(samples, found.distance(samples), strict=True):
        away = [in_8_bits @ (sample @ signs - mean) / deviation for mean in means]
        wanted = min(float(one.square().sum()) / len(one) for one in away)
        assert float(distance) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("samples", [5, 40, 4000])
def test_the_covariance_of_few_samples_shrinks_by_ledoit_and_wolf(samples: int) -> None:
    values = torch.randn(samples, 20, dtype=torch.float64) * torch.linspace(0.1, 2, 20).double()
    found = shrinkage(values)
    assert found == pytest.approx(naive_shrinkage(list(values)), rel=1e-9)
    assert 0 < found < 1
    assert shrinkage(torch.zeros(4, 3, dtype=torch.float64)) == 1


def test_separation_and_shares_by_their_formulas() -> None:
    scores = 2 + 3 * torch.randn(500, dtype=torch.float64)
    mean = sum(scores.tolist()) / 500
    variance = sum((x - mean) ** 2 for x in scores.tolist()) / 500
    assert separation(scores) == pytest.approx((mean / math.sqrt((1 + variance) / 2)) ** 2)
    assert separation(-scores) == 0
    assert separation(torch.full((3,), 1e300, dtype=torch.float64)) == pytest.approx(2e12)
    known = [TaskFeatures({}, None, (0, 1), (0, 1), two) for two in [(0, 0), (3, 4), (1, 12)]]
    assert share_of_energy(known) == pytest.approx(0.25 * 16 / (4 + 0.25 * 16))
    assert share_of_energy(known[:1]) == pytest.approx(0.2)


def test_signs_are_the_same_everywhere() -> None:
    signs = (projection(400) * 20).round().int()
    assert signs[0, :12].tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1]


def test_neurons_that_are_all_constant_say_nothing() -> None:
    values, labels = torch.ones(20, 3, dtype=torch.float64), torch.arange(20) % 2
    found = ClassMeans.of(values, labels)
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
        slice_ = learned.tasks[0].slice
        again = type(before).of(learned.model, slice_, apart((0, 1, 2)))
    assert again.usual == before.usual
    assert again.usual_energy == before.usual_energy
    learned.tasks[0].save(tmp_path / "task")
    loaded = Task.load(tmp_path / "task").features
    assert (loaded.usual, loaded.usual_energy) == (before.usual, before.usual_energy)
    assert (loaded.layers, loaded.found.scale) == (before.layers, before.found.scale)
    assert torch.equal(loaded.found.means, before.found.means)
    assert torch.equal(loaded.found.whitening, before.found.whitening)
    assert torch.equal(loaded.found.steps, before.found.steps)


def test_features_are_of_the_critical_neurons_of_all_layers(learned: IncrementalTrainer) -> None:
    task, model = learned.tasks[0], learned.model
    inputs = torch.cat([inputs for inputs, _ in apart((0, 1, 2))])
    with learned.task(0), torch.no_grad():
        first = model[1](inputs).relu()[:, task.slice.kept["1"]]
        hidden = model[1](inputs).relu() * task.slice.kept["1"]
        second = model[3](hidden).relu()[:, task.slice.kept["3"]]
    sizes = [float(values.square().mean().sqrt()) for values in (first, second)]
    assert list(task.features.layers) == ["1", "3"]
    assert list(task.features.layers.values()) == pytest.approx(sizes, rel=1e-5)
    together = torch.cat([first / sizes[0], second / sizes[1]], 1)
    distances = task.features.found.distance(together)
    assert float(distances.mean()) == pytest.approx(task.features.usual[0], rel=1e-4)


def test_a_task_takes_a_few_kilobytes_however_wide_the_layer() -> None:
    values, labels = clouds(3000, samples=200)
    found = ClassMeans.of(values, labels)
    features = TaskFeatures({"layer": 1.0}, found, (0.0, 1.0), (0.0, 1.0))
    assert features.nbytes == 128 * 129 // 2 + (1 + 3) * 128 * 4 < 10_500


def test_a_task_knows_how_far_it_is_from_those_before(
    learned: IncrementalTrainer, tmp_path
) -> None:
    first, second = learned.tasks
    assert first.features.separation == (0, 0)
    inputs = torch.cat([inputs for inputs, _ in apart((3, 4))])
    with learned.task(0, masked=True), torch.no_grad():
        scores = learned.model(inputs)
        hidden = (learned.model[1](inputs).relu() * first.slice.kept["1"]).double()
        found = {"1": hidden[:, first.slice.kept["1"]]}
        found["3"] = learned.model[3](hidden.to(inputs)).relu()[:, first.slice.kept["3"]]
    wanted = (
        separation(first.features.score(found)), separation(first.features.energy_score(scores))
    )  # fmt: skip
    assert second.features.separation == pytest.approx(wanted, rel=1e-3)
    assert wanted[0] > 1
    second.save(tmp_path / "task")
    assert Task.load(tmp_path / "task").features.separation == second.features.separation


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
