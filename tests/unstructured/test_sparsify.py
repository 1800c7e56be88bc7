"""What holds for every method: exact counts, refinement, and errors that change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from nss_prune.errors import ArgumentError, NothingToPruneError, NumericalError
from nss_prune.unstructured import METHODS, compression_rate, sparsify, weight_count
from reference_unstructured import (
    Tied,
    assert_as_it_was,
    convolutional,
    fresh,
    kept_by_score,
    lamp_scores,
    largest,
    magnitudes,
    perceptron,
    registered_masks,
    snapshot,
)

every_method = pytest.mark.parametrize("method", sorted(METHODS))


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


@every_method
@pytest.mark.parametrize("make", [perceptron, convolutional, Tied])
@pytest.mark.parametrize("amount", [0, 0.1, 0.333, 0.5])
def test_exact_totals_and_the_largest_of_each_layer(method, make, amount):
    model = fresh(make)
    weights = {name: module.weight.clone() for name, module in model.named_modules()
               if isinstance(getattr(module, "weight", None), nn.Parameter)}  # fmt: skip
    masks = sparsify(model, amount, method)
    assert kept(masks) == round(weight_count(model) * (1 - amount))
    for name, mask in masks.items():
        everything = torch.ones_like(mask)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, largest(weights[name], everything, int(mask.sum())))
        assert torch.equal(model.get_submodule(name).weight, weights[name] * mask)


@every_method
def test_masks_only_shrink_and_amount_is_of_what_remains(method):
    model = fresh(convolutional)
    total = weight_count(model)
    before = {}
    for _ in range(4):
        masks = sparsify(model, 0.15, method)
        assert all(torch.equal(masks[n], m) for n, m in registered_masks(model).items())
        assert not any((mask & ~before.get(name, mask)).any() for name, mask in masks.items())
        total = round(total * 0.85)
        assert kept(masks) == total
        before = {name: mask.clone() for name, mask in masks.items()}


@pytest.mark.parametrize(("method", "score"), [("lamp", lamp_scores), ("global", magnitudes)])
@pytest.mark.parametrize("make", [perceptron, Tied])
def test_ranked_methods_against_the_oracle_over_iterations(method, score, make):
    model = fresh(make)
    if make is Tied:
        weights = {"one": model.one.weight, "head": model.head.weight}
    else:
        weights = {name: model.get_submodule(name).weight for name in "023"}
    expected = [torch.ones_like(weight, dtype=torch.bool) for weight in weights.values()]
    for _ in range(3):
        keep = round(sum(int(mask.sum()) for mask in expected) * 0.7)
        scores = [score(w, m) for w, m in zip(weights.values(), expected, strict=True)]
        expected = kept_by_score(scores, expected, keep)
        masks = sparsify(model, 0.3, method)
        for name, mask in zip(weights, expected, strict=True):
            assert torch.equal(masks[name], mask)


@every_method
@pytest.mark.parametrize("structured_share", [0.0, 0.2049])
def test_compression_rate_is_the_paper_s_arithmetic(method, structured_share):
    """CR = 1 - (1 - s)(1 - r)^k: of a million weights all the shares are whole numbers."""
    model = nn.Sequential(nn.Linear(1000, 900), nn.Linear(900, 100), nn.Linear(100, 100))
    dense = round(weight_count(model) / (1 - structured_share))
    share = 1 - weight_count(model) / dense
    for k in range(1, 5):
        sparsify(model, 0.1, method)
        expected = 1 - (1 - share) * 0.9**k
        assert compression_rate(model, dense) == pytest.approx(expected, abs=1e-6)


@every_method
def test_biases_norms_and_ignored_layers_stay(method):
    model = fresh(convolutional)
    before = snapshot(model)
    masks = sparsify(model, 0.5, method, ignored_layers=["3", model[5]])
    assert list(masks) == ["0", "2", "4", "6"]
    now = model.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in before if name in now)
    assert {name for name in before if name not in now} == {f"{name}.weight" for name in masks}
    assert not prune.is_pruned(model[3])


@every_method
def test_all_zero_layers_and_ties(method):
    model = fresh(perceptron)
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.fill_(0.5)
    masks = sparsify(model, 0.5, method)
    assert kept(masks) == 555
    for name in "02":
        flat = masks[name].flatten()
        assert flat[: int(flat.sum())].all()


@every_method
def test_deterministic_in_every_precision(method):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        one, two = (sparsify(fresh(convolutional).to(dtype), 0.4, method) for _ in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert kept(one) == round(weight_count(convolutional()) * 0.6)


def test_amount_zero_masks_nothing():
    model = fresh(perceptron)
    assert all(mask.all() for mask in sparsify(model, 0).values())


@every_method
@pytest.mark.parametrize("amount", [-0.1, 1, 1.5, float("nan"), float("inf"), "0.1", None, 1 + 0j])
def test_amounts_outside_the_range(method, amount):
    model = fresh(perceptron)
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=r"\[0, 1\)"):
        sparsify(model, amount, method)
    assert_as_it_was(model, before)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"method": "magnitude"}, ArgumentError),
        ({"method": lambda layers, keep: [0] * len(layers)}, ArgumentError),
        ({"ignored_layers": ["missing"]}, ArgumentError),
        ({"ignored_layers": [nn.Linear(2, 2)]}, ArgumentError),
        ({"ignored_layers": ["0", "2", "3"]}, NothingToPruneError),
    ],
)
def test_bad_arguments_change_nothing(arguments, error):
    model = fresh(perceptron)
    before = snapshot(model)
    with pytest.raises(error):
        sparsify(model, 0.1, **arguments)
    assert_as_it_was(model, before)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_change_nothing(method, value):
    model = fresh(perceptron)
    with torch.no_grad():
        model[3].weight[0, 0] = value
    before = snapshot(model)
    with pytest.raises(NumericalError, match="'3'"):
        sparsify(model, 0.1, method)
    assert_as_it_was(model, before)


@every_method
def test_nothing_left(method):
    model = nn.Sequential(nn.Linear(2, 2))
    prune.custom_from_mask(model[0], "weight", torch.zeros(2, 2))
    with pytest.raises(NothingToPruneError, match="masked already"):
        sparsify(model, 0.1, method)
    assert registered_masks(model)["0"].sum() == 0


def test_a_model_that_is_one_layer():
    model = nn.Linear(10, 10)
    assert {name: int(mask.sum()) for name, mask in sparsify(model, 0.5).items()} == {"": 50}


def test_a_failure_while_masks_are_set_changes_nothing(monkeypatch):
    model = fresh(perceptron)
    before = snapshot(model)

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(model[3], "register_buffer", fail)
    with pytest.raises(MemoryError):
        sparsify(model, 0.5)
    assert_as_it_was(model, before)
