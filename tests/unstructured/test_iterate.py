"""Iterations: numbers, stop rules, rollback, resumption."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nss_prune.errors import ArgumentError, FileFormatError, ModelMismatchError, NothingToPruneError
from nss_prune.unstructured import (
    METHODS,
    AccuracyTolerance,
    CompressionRate,
    Iterations,
    StopRule,
    compression_rate,
    iterative_sparsify,
    sparsify,
    weight_count,
)
from reference_unstructured import (
    Tied,
    assert_as_it_was,
    fresh,
    perceptron,
    registered_masks,
    snapshot,
)

every_method = pytest.mark.parametrize("method", sorted(METHODS))


def numbers(iterations):
    """Iterations without their times."""
    return [(it.number, it.compression_rate, it.accuracy) for it in iterations]


def train(model):
    """Deterministic fine-tuning that moves every weight and buffer."""
    inputs = torch.linspace(-1, 1, 80).view(4, 20)
    for _ in range(2):
        model.zero_grad()
        model(inputs).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad


def normed():
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5))


def remaining_share(model):
    return 1 - compression_rate(model, weight_count(model))


def assert_same(one, two):
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


@every_method
@pytest.mark.parametrize("structured_share", [0.0, 0.2049])
def test_rounding_does_not_add_up(method, structured_share):
    """CR = 1 - (1 - s)(1 - r)^k to within half a weight after any number of iterations."""
    model = fresh(perceptron)
    dense = round(weight_count(model) / (1 - structured_share))
    left = weight_count(model) / dense
    run = iterative_sparsify(model, 0.07, method, until=Iterations(12), dense_weights=dense)
    for iteration in run:
        expected = 1 - left * 0.93**iteration.number
        assert abs(iteration.compression_rate - expected) <= 0.5 / dense + 1e-12
        assert iteration.compression_rate == compression_rate(model, dense)
        assert iteration.accuracy is None
        assert iteration.seconds > 0
    assert iteration.number == 12


@every_method
def test_the_paper_s_arithmetic_to_a_millionth(method):
    model = nn.Sequential(nn.Linear(1000, 500), nn.Linear(500, 40), nn.Linear(40, 10))
    dense = weight_count(model)
    run = iterative_sparsify(model, 0.1, method, until=Iterations(3), dense_weights=dense)
    for iteration in run:
        assert iteration.compression_rate == pytest.approx(1 - 0.9**iteration.number, abs=1e-6)


def test_stops_with_the_first_iteration_at_a_compression_rate():
    rates = [it.compression_rate for it in iterative_sparsify(
        fresh(), 0.1, until=CompressionRate(0.4))]  # fmt: skip
    assert rates[-2] < 0.4 <= rates[-1]
    assert len(rates) == 5


def test_does_nothing_if_a_rule_holds_at_the_start():
    model = fresh()
    sparsify(model, 0.5)
    before = registered_masks(model)
    assert list(iterative_sparsify(model, 0.1, until=CompressionRate(0.5))) == []
    assert all(torch.equal(mask, before[n]) for n, mask in registered_masks(model).items())


def test_the_first_of_several_rules_counts():
    rules = [Iterations(4), CompressionRate(0.99)]
    assert len(list(iterative_sparsify(fresh(), 0.1, until=rules))) == 4
    rules = [Iterations(4), CompressionRate(0.15)]
    assert len(list(iterative_sparsify(fresh(), 0.1, until=rules))) == 2


@pytest.mark.parametrize("finetune", [None, train])
def test_an_iteration_beyond_the_tolerance_is_undone(finetune):
    """The accuracy here is the share of weights left: 0.9, 0.81, 0.729."""
    rule = AccuracyTolerance(points=20, reference=1.0)
    model, other = fresh(normed), fresh(normed)
    done = list(
        iterative_sparsify(model, 0.1, until=rule, evaluate=remaining_share, finetune=finetune)
    )
    assert [it.number for it in done] == [1, 2]
    assert done[-1].accuracy == pytest.approx(0.81, abs=1e-3)
    list(iterative_sparsify(other, 0.1, until=Iterations(2), finetune=finetune))
    assert_same(model, other)
    inputs = torch.randn(3, 20)
    assert torch.equal(model.eval()(inputs), other.eval()(inputs))


def test_undoing_the_first_iteration_leaves_no_masks():
    model = fresh(normed)
    before = snapshot(model)
    rule = AccuracyTolerance(points=1, reference=1.0)
    run = iterative_sparsify(model, 0.1, until=rule, evaluate=remaining_share, finetune=train)
    assert list(run) == []
    assert_as_it_was(model, before)


def test_a_rule_of_one_s_own():
    class Odd(StopRule):
        def reached(self, iteration):
            return iteration.number == 3

    assert len(list(iterative_sparsify(fresh(), 0.1, until=Odd()))) == 3


def test_nothing_left_ends_in_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    run = iterative_sparsify(model, 0.5, until=Iterations(99))
    assert [next(run).number for _ in range(3)] == [1, 2, 3]
    with pytest.raises(NothingToPruneError, match="stop earlier"):
        list(run)
    assert sum(int(mask.sum()) for mask in registered_masks(model).values()) == 1


@pytest.mark.parametrize("finetune", [None, train])
@pytest.mark.parametrize("interrupted_after", [1, 2, 5])
def test_resumed_equals_uninterrupted(tmp_path, finetune, interrupted_after):
    def iterate(model, checkpoint):
        return iterative_sparsify(
            model,
            0.1,
            until=Iterations(5),
            finetune=finetune,
            evaluate=remaining_share,
            checkpoint=checkpoint,
            ignored_layers=["3"],
        )

    whole, path = fresh(normed), tmp_path / "run.safetensors"
    expected = numbers(iterate(whole, None))
    first = iterate(fresh(normed), path)
    done = numbers(next(first) for _ in range(interrupted_after))
    resumed = fresh(normed)
    done += numbers(iterate(resumed, path))
    assert done == expected
    assert_same(resumed, whole)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_resumes_shared_weights(tmp_path):
    def finetune(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)

    def iterate(model, checkpoint, count):
        rule = Iterations(count)
        list(iterative_sparsify(model, 0.2, until=rule, finetune=finetune, checkpoint=checkpoint))

    whole, resumed = fresh(Tied), fresh(Tied)
    iterate(whole, None, 3)
    iterate(fresh(Tied), tmp_path / "run", 2)
    iterate(resumed, tmp_path / "run", 3)
    assert_same(resumed, whole)
    assert resumed.head.weight_orig is resumed.embedding.weight_orig


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"amount": 0.2}, "rate = 0.1"),
        ({"method": "global"}, "method = 'lamp'"),
        ({"finetune": train}, "finetune = False"),
        ({"ignored_layers": ["0"]}, "layers = "),
        ({"dense_weights": 5000}, "dense_weights = 1110"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, other, named):
    path = tmp_path / "run"
    settings = {"amount": 0.1, "until": Iterations(1), "checkpoint": path}
    list(iterative_sparsify(fresh(), **settings))
    model = fresh()
    before = snapshot(model)
    with pytest.raises(ModelMismatchError, match=named):
        iterative_sparsify(model, **{**settings, **other})
    assert_as_it_was(model, before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    settings = {"until": Iterations(1), "checkpoint": tmp_path / "run", "dense_weights": 9999}
    list(iterative_sparsify(nn.Sequential(nn.Linear(20, 3)), 0.1, finetune=train, **settings))
    for other in (nn.Sequential(nn.Linear(20, 4)), nn.Sequential(nn.Linear(20, 3, bias=False))):
        before = snapshot(other)
        with pytest.raises(ModelMismatchError):
            iterative_sparsify(other, 0.1, finetune=train, **settings)
        assert_as_it_was(other, before)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run"
    path.write_bytes(b"nothing of the kind")
    model = fresh()
    before = snapshot(model)
    with pytest.raises(FileFormatError):
        iterative_sparsify(model, 0.1, until=Iterations(1), checkpoint=path)
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"amount": 0},
        {"amount": 1},
        {"amount": float("nan")},
        {"method": "other"},
        {"until": []},
        {"until": 5},
        {"until": [5]},
        {"until": AccuracyTolerance(1, 0.9)},
        {"ignored_layers": ["missing"]},
        {"dense_weights": 3},
    ],
)
def test_bad_arguments_are_found_by_the_call_itself(arguments):
    model = fresh()
    before = snapshot(model)
    with pytest.raises(ArgumentError):
        iterative_sparsify(model, **{"amount": 0.1, "until": Iterations(1), **arguments})
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    "rule",
    [
        lambda: Iterations(0),
        lambda: CompressionRate(1.0),
        lambda: CompressionRate(90),
        lambda: AccuracyTolerance(-1, 0.9),
        lambda: AccuracyTolerance(1, 98.4),
        lambda: AccuracyTolerance(float("nan"), 0.9),
    ],
)
def test_rules_check_their_units(rule):
    with pytest.raises(ArgumentError):
        rule()


def test_an_accuracy_in_percent_is_refused():
    run = iterative_sparsify(fresh(), 0.1, until=Iterations(1), evaluate=lambda model: 98.4)
    with pytest.raises(ArgumentError, match="0.984"):
        next(run)


def test_the_old_name_of_the_amount_works_with_a_warning() -> None:
    model = torch.nn.Linear(10, 10)
    with pytest.warns(DeprecationWarning, match="rate= is now amount="):
        (iteration,) = iterative_sparsify(model, rate=0.1, until=Iterations(1))
    assert iteration.compression_rate == pytest.approx(0.1)
    with pytest.raises(ArgumentError, match="amount"):
        iterative_sparsify(model, until=Iterations(1))
