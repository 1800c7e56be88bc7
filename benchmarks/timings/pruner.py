"""What NSSPruner costs beside torch-pruning's pruner, and how fast the smaller model is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.common.tables import Column
from benchmarks.common.timing import COLUMNS, Rows, in_turn, ratio_row, seconds, show
from benchmarks.rivals.recipe import attention_heads
from nss_prune import NSSPruner, Profile, profile

LATENCY_COLUMNS = (*COLUMNS, Column("macs", "MACs kept %", 1))
PLANNED = ("resnet50", "vit_base_patch16_224", "convnext_tiny")
FASTER = ("resnet50", "convnext_tiny", "vit_small_patch16_224")
BUDGETS = (("macs_budget", "MACs", ">= 1.5"), ("latency_budget", "seconds", "2"))
PICTURE = (3, 224, 224)
RATIO = 0.5


def planning(repeats: int) -> Rows:
    """Constructor and step, given a profile, against those of torch-pruning by magnitude."""
    rows: Rows = []
    for name in PLANNED:
        model, inputs, known = profiled(name)
        ours, theirs = [], []
        for _ in range(repeats):
            ours.append(on_copy(model, lambda copied, k=known, x=inputs: prune_ours(copied, x, k)))  # type: ignore[misc]
            theirs.append(on_copy(model, lambda copied, x=inputs: prune_theirs(copied, x)))  # type: ignore[misc]
        what = f"constructor and step, {name}, against torch-pruning"
        rows.append(ratio_row(what, ours, theirs, "<= 1.3", faster=False))
        show(rows[-1])
    return rows


def profiled(name: str) -> tuple[nn.Module, Tensor, Profile]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    inputs = torch.randn(1, *PICTURE)
    pictures = torch.randn(8, *PICTURE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, inputs, profile(model, [(pictures, torch.arange(8))], progress=False)


def on_copy(model: nn.Module, function: Callable[[nn.Module], None]) -> float:
    copied = copy.deepcopy(model)
    return seconds(lambda: function(copied))


def prune_ours(model: nn.Module, inputs: Tensor, known: Profile) -> None:
    NSSPruner(model, inputs, params_budget=1 - RATIO, round_to=1, profile=known).step()


def prune_theirs(model: nn.Module, inputs: Tensor) -> None:
    """torch-pruning's recipe for timm models: the classifier stays, attention by its heads."""
    pruner = tp.pruner.BasePruner(
        model, (inputs,), tp.importance.GroupMagnitudeImportance(), pruning_ratio=RATIO,
        ignored_layers=[model.get_classifier()], num_heads=attention_heads(model),  # type: ignore[operator]
    )  # fmt: skip
    pruner.step()


def latency(repeats: int) -> Rows:
    """One forward pass of the whole model against that of the model at half of its cost."""
    rows: Rows = []
    for name in FASTER:
        model, _, known = profiled(name)
        batch = torch.randn(8, *PICTURE)
        for budget, what, target in BUDGETS:
            smaller = copy.deepcopy(model)
            pruner = NSSPruner(smaller, batch, round_to=8, profile=known, **{budget: RATIO})  # type: ignore[arg-type]
            pruner.step()
            assert pruner.report is not None
            with torch.no_grad():
                ours, whole = in_turn(
                    lambda m=smaller, x=batch: m(x),  # type: ignore[misc]
                    lambda m=model, x=batch: m(x),  # type: ignore[misc]
                    repeats,
                )
            row = ratio_row(
                f"forward pass, {name}, half of its {what}", ours, whole, target, faster=True
            )
            share = 100 * pruner.report.after.macs / pruner.report.before.macs
            rows.append({**row, "macs": share})
            show(rows[-1])
    return rows
