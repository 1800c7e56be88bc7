"""Unstructured passes: masks on single weights, chosen by LAMP, Global, Uniform+ or ERK."""

from __future__ import annotations

from nss_prune.unstructured.allocation import METHODS, Allocation, proportional
from nss_prune.unstructured.iterate import iterative_sparsify
from nss_prune.unstructured.masks import make_permanent, refresh
from nss_prune.unstructured.semi_structured import n_m, to_semi_structured
from nss_prune.unstructured.sparsify import sparsify
from nss_prune.unstructured.sparsity import LayerSparsity, SparsityReport, sparsity_report
from nss_prune.unstructured.stopping import (
    AccuracyTolerance,
    CompressionRate,
    Iteration,
    Iterations,
    StopRule,
)
from nss_prune.unstructured.storage import load_masks, save_masks
from nss_prune.unstructured.weights import Layer, compression_rate, weight_count

__all__ = [
    "METHODS",
    "AccuracyTolerance",
    "Allocation",
    "CompressionRate",
    "Iteration",
    "Iterations",
    "Layer",
    "LayerSparsity",
    "SparsityReport",
    "StopRule",
    "compression_rate",
    "iterative_sparsify",
    "load_masks",
    "make_permanent",
    "n_m",
    "proportional",
    "refresh",
    "save_masks",
    "sparsify",
    "sparsity_report",
    "to_semi_structured",
    "weight_count",
]
