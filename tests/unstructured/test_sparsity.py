"""Density and bytes, computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nss_prune.unstructured import make_permanent, sparsify, sparsity_report
from nss_prune.unstructured.sparsity import LayerSparsity
from reference_unstructured import Tied, convolutional, fresh, perceptron


def test_bytes_of_a_small_layer():
    model = nn.Sequential(nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(10.0).view(2, 5) - 3)
    sparsify(model, 0.5)
    (row,) = sparsity_report(model).rows
    assert row == LayerSparsity(
        name="0",
        shape=(2, 5),
        weights=10,
        nonzero=5,
        dense_bytes=40,
        csr_bytes=5 * (4 + 4) + 3 * 4,
        bitmap_bytes=2 + 5 * 4,
    )
    assert row.density == 0.5


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("make", [perceptron, convolutional, Tied])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_agree_with_the_weights_and_torch_s_csr(make, dtype):
    model = fresh(make).to(dtype)
    sparsify(model, 0.7)
    report = sparsity_report(model)
    make_permanent(model)
    assert sparsity_report(model) == report
    for row in report.rows:
        weight = model.get_submodule(row.name).weight.detach()
        csr = weight.flatten(1).to_sparse_csr()
        assert row.shape == tuple(weight.shape)
        assert row.nonzero == csr.values().numel()
        assert row.dense_bytes == weight.numel() * weight.element_size()
        indices = csr.col_indices().numel() + csr.crow_indices().numel()
        assert row.csr_bytes == row.nonzero * weight.element_size() + 4 * indices


def test_totals_and_table():
    model = fresh(convolutional)
    sparsify(model, 0.5)
    report = sparsity_report(model)
    assert report.total.weights == sum(row.weights for row in report.rows)
    assert report.total.density == pytest.approx(0.5, abs=1e-3)
    lines = str(report).splitlines()
    assert len(lines) == 2 + len(report.rows)
    assert len({len(line) for line in lines}) == 1
    assert "8 x 3 x 3 x 3" in lines[1]
    assert lines[-1].startswith("total")


def test_zeros_without_masks_count_as_zeros():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[0] = 0
    assert sparsity_report(model).rows[0].nonzero == 12


def test_a_model_without_layers():
    report = sparsity_report(nn.ReLU())
    assert report.rows == ()
    assert report.total.density == 1
