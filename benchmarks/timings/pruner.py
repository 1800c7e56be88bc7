"""What NSSPruner costs beside torch-pruning's pruner, and how fast the smaller model is."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable

import timm
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.common.tables import Column
from benchmarks.common.timing import COLUMNS, Rows, in_turn, ratio_row, show
from benchmarks.rivals.recipe import attention_heads
from nss_prune import NSSPruner, Profile, profile

LATENCY_COLUMNS = (*COLUMNS, Column("macs", "MACs kept %", 1))
PLANNED = ("resnet18", "resnet50", "vit_tiny_patch16_224", "convnext_tiny")
FASTER = ("resnet50", "convnext_tiny", "vit_small_patch16_224")
BUDGETS = (("macs_budget", "MACs", ">= 1.5"), ("latency_budget", "seconds", "2"))
PICTURE = (3, 224, 224)
RATIO = 0.5


def planning(repeats: int) -> Rows:
    """Constructor and step by an importance, against torch-pruning's: seconds of the processor."""
    rows: Rows = []
    for name in PLANNED:
        torch.manual_seed(0)
        model, inputs = timm.create_model(name).eval(), torch.randn(1, *PICTURE)
        ours, theirs = [], []
        for repeat in range(repeats + 1):  # the first does not count
            times = on_copy(model, prune_ours, inputs), on_copy(model, prune_theirs, inputs)
            if repeat:
                ours.append(times[0])
                theirs.append(times[1])
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


def on_copy(
    model: nn.Module, function: Callable[[nn.Module, Tensor], None], inputs: Tensor
) -> float:
    """Seconds of the processor that a function takes with a copy of the model."""
    copied = copy.deepcopy(model)
    begin = time.process_time()
    function(copied, inputs)
    return time.process_time() - begin


def prune_ours(model: nn.Module, inputs: Tensor) -> None:
    """Without data: what is asked for is the same on both sides."""
    head: nn.Module = model.get_classifier()  # type: ignore[operator]
    criterion = tp.importance.GroupMagnitudeImportance()
    NSSPruner(model, inputs, criterion, pruning_ratio=RATIO, ignored_layers=[head]).step()


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
