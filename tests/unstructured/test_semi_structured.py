"""N:M masks against a loop over groups, and the conversion where no GPU is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nss_prune.errors import ArgumentError, NothingToPruneError, NumericalError
from nss_prune.unstructured import magnitudes as magnitudes_module
from nss_prune.unstructured import n_m, sparsify, to_semi_structured
from reference_unstructured import assert_as_it_was, fresh, snapshot


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(magnitudes_module, "_BLOCK", 64)


def layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 6, 3),
        nn.Conv2d(16, 6, 1, groups=2),
        nn.ConvTranspose1d(24, 5, 3),
        nn.Linear(40, 7),
    )


def naive(weight, mask, axis, n, m):
    """Group by group: the n largest survivors, equal ones by position."""
    kept = torch.zeros_like(mask)
    magnitudes, alive, result = (
        t.movedim(axis, -1).flatten(0, -2) for t in (weight.abs(), mask, kept)
    )
    result = torch.zeros_like(alive)
    for row in range(len(alive)):
        for start in range(0, alive.shape[1], m):
            group = [i for i in range(start, start + m) if alive[row, i]]
            for index in sorted(group, key=lambda i: -magnitudes[row, i])[:n]:
                result[row, index] = True
    return result.view(weight.movedim(axis, -1).shape).movedim(-1, axis)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("earlier", [0.0, 0.5])
def test_against_a_loop(n, m, earlier):
    model = fresh(layers)
    with torch.no_grad():
        model[3].weight.mul_(20).round_()  # ties
    masks = sparsify(model, earlier)
    before = {name: mask.clone() for name, mask in masks.items()}
    axes = {"0": 1, "1": 1, "2": 0, "3": 1}
    for name, mask in n_m(model, n, m).items():
        weight = model.get_submodule(name).weight_orig.detach()
        assert torch.equal(mask, naive(weight, before[name], axes[name], n, m))
        if not earlier:
            assert mask.sum() * m == mask.numel() * n


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"n": 0}, "0 < n < m"),
        ({"n": 4}, "0 < n < m"),
        ({"m": 4.0}, "0 < n < m"),
        ({"m": 16}, r"\['0', '1', '2', '3'\]"),
        ({"m": 12}, r"\['0', '1', '3'\]"),
        ({"ignored_layers": ["5"]}, "not in the model"),
    ],
)
def test_bad_arguments_change_nothing(arguments, match):
    model = fresh(layers)
    before = snapshot(model)
    with pytest.raises(ArgumentError, match=match):
        n_m(model, **arguments)
    assert_as_it_was(model, before)


def test_weights_must_be_finite():
    model = fresh(layers)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(NumericalError):
        n_m(model)
    assert_as_it_was(model, before)


def test_ignored_layers_may_have_uneven_inputs():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8))
    assert list(n_m(model, ignored_layers=["0"])) == ["1"]


def test_conversion_needs_two_of_four():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(4, 4, 1))
    for prepare in (lambda: None, lambda: sparsify(model, 0.1), lambda: n_m(model, 3, 4)):
        prepare()
        with pytest.raises(NothingToPruneError, match="n_m"):
            to_semi_structured(model)


def test_conversion_needs_a_gpu():
    model = nn.Sequential(nn.Linear(64, 64))
    masks = n_m(model)
    with pytest.raises(ArgumentError, match="cpu"):
        to_semi_structured(model)
    assert torch.equal(model[0].weight_mask, masks["0"])


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU with sparse tensor cores",
)
def test_conversion_computes_the_same():
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).half().cuda()
    n_m(model)
    inputs = torch.randn(128, 128, dtype=torch.half, device="cuda")
    with torch.no_grad():
        expected = model(inputs)
        assert to_semi_structured(model) == ("0", "2")
        torch.testing.assert_close(model(inputs), expected, rtol=1e-2, atol=1e-2)
