"""Both sides: torch-pruning's standard recipe, and NSSPruner with a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.architectures import small
from benchmarks.architectures.outcomes import OURS, THEIRS
from benchmarks.architectures.trial import Prune, Trial, passes, sampled
from benchmarks.common.timing import seconds, with_peak
from benchmarks.rivals.recipe import attention_heads
from nss_prune import NSSPruner, Report
from nss_prune.core.nested import tensors_in
from nss_prune.errors import NSSPruneError, RemovalError

PRUNING_RATIO = 0.5  # of torch-pruning's recipe
BUDGET = 0.7  # share of the parameters that we keep
TOLERANCE = 0.01


def prune_theirs(trial: Trial, network: nn.Module, inputs: Tensor) -> None:
    """torch-pruning's recipe: the classifier is ignored, the heads of attention shrink alike."""
    trial.begin("build")
    pruner = tp.pruner.BasePruner(
        network,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=PRUNING_RATIO,
        global_pruning=False,
        ignored_layers=classifiers(network),
        num_heads=attention_heads(network),
        prune_head_dims=True,
    )
    trial.begin("prune")
    pruner.step()


def classifiers(network: nn.Module) -> list[nn.Module]:
    """What makes the classes: as timm says, else the last layer with as many outputs."""
    if hasattr(network, "get_classifier"):
        classified: Any = network
        found = classified.get_classifier()
        layers = found if isinstance(found, (tuple, list)) else (found,)
        return [layer for layer in layers if isinstance(layer, nn.Module)]
    classes = _classes(network)
    wide = [
        layer
        for layer in network.modules()
        if classes in (getattr(layer, "out_features", None), getattr(layer, "out_channels", None))
    ]
    return wide[-1:]


def _classes(network: nn.Module) -> int:
    """Scores of a model: its words, or a few classes, of the small suites; those of ImageNet."""
    if isinstance(network, small.Scores):
        return small.CLASSES if network.is_classifier else small.WORDS
    return 1000


def prune_ours(trial: Trial, network: nn.Module, inputs: Tensor) -> None:
    """NSSPruner as it is; its allocation is timed beside bare passes over the same pictures."""
    data = sampled(network, inputs, trial.samples, trial.pixels)
    before = bits(network)
    try:
        trial.begin("build")
        pruner = NSSPruner(network, inputs, data=data, progress=False, **amount(trial))
        trial.begin("prune")
        if trial.theta is None:
            measure_allocation(trial, network, pruner, data)
        pruner.step()
    except Exception as error:
        if isinstance(error, RemovalError):
            trial.begin("equal")
        trial.outcome.refused = isinstance(error, NSSPruneError)
        trial.outcome.intact = bits(network) == before
        raise
    assert pruner.report is not None
    trial.outcome.notes.extend(notes(pruner.report))
    if trial.theta is None:
        trial.outcome.budget = budget(pruner.report)


def measure_allocation(
    trial: Trial, network: nn.Module, pruner: NSSPruner, data: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Note what the allocation takes, which the step then has, and what the bare passes take."""
    outcome = trial.outcome
    outcome.samples = sum(len(labels) for _, labels in data)
    outcome.size = data[0][0].shape[-1]
    if passes(bare_passes, network, data[:1]):  # which warms up as well
        outcome.passes = seconds(lambda: bare_passes(network, data))
    network.zero_grad()
    outcome.allocation, outcome.memory = with_peak(lambda: pruner.slice)


def bare_passes(network: nn.Module, data: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Forward and backward, as in training without the optimiser, in evaluation mode."""
    for inputs, _ in data:
        network.zero_grad()
        outputs = tensors_in(network.eval()(inputs))
        torch.stack([output.float().sum() for output in outputs]).sum().backward()


def amount(trial: Trial) -> dict[str, Any]:
    """How much is to go; a third of the time is for torch-pruning's tracing."""
    if trial.theta is not None:
        return {"theta": trial.theta}
    meaning = {"outputs": small.OUTPUTS.get(trial.model.source)}
    return {"params_budget": BUDGET, "round_to": 1, "timeout": trial.left / 3, **meaning}


def bits(network: nn.Module) -> dict[str, Any]:
    """The training flags, and a hash of every tensor of the state: NaN equals NaN here."""
    flags: dict[str, Any] = {name: module.training for name, module in network.named_modules()}
    tensors = {
        f"{name}: tensor": (tensor.shape, tensor.dtype, hashed(tensor))
        for name, tensor in network.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    return flags | tensors


def hashed(tensor: Tensor) -> bytes:
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw).digest()


def notes(report: Report) -> list[str]:
    left = sum(row.reason != "" for row in report.rows)
    return [f"{left} of {len(report.rows)} layers left alone", *report.notes]


def budget(report: Report) -> str:
    """Whether the budget was met, within the tolerance, or a note says why not."""
    if report.after.parameters <= (BUDGET + TOLERANCE) * report.before.parameters:
        return "met"
    return "explained" if any("budget" in note for note in report.notes) else "missed"


PRUNE: dict[str, Prune] = {THEIRS: prune_theirs, OURS: prune_ours}
