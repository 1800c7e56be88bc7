"""On a GPU everything comes to what it comes to on a CPU, and bits that are kept are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from frozen import assert_only_these_moved, bits, entries_with_names
from networks import settled
from nss_prune import (
    DeepArc,
    IncrementalTrainer,
    NSSPruner,
    ReadaptTrainer,
    Slice,
    load_pruned,
    profile,
    remove,
    save_pruned,
    sparsify,
)
from nss_prune.adaptation import critical_channels, critical_entries
from nss_prune.compensation.folding import fold
from nss_prune.core.nested import moved
from nss_prune.profiling.contributions.protocol import metrics_known
from nss_prune.statistics.consumers import consumer_statistics
from nss_prune.unstructured import iterative_sparsify
from nss_prune.unstructured.iterate import Iterations

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Batches = list[tuple[Tensor, Tensor]]


def test_batches_arrive_with_their_values() -> None:
    batch = {"inputs": torch.randn(64, 3, 32, 32), "labels": [torch.arange(64)]}
    sent = moved(batch, DEVICE)
    assert sent["inputs"].is_cuda
    back = moved(sent, "cpu")
    assert torch.equal(back["inputs"], batch["inputs"])
    assert torch.equal(back["labels"][0], batch["labels"][0])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(),
        nn.Linear(24, 4),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 40, 3, padding=1), nn.BatchNorm2d(40), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(40, 36, 3, padding=1), nn.BatchNorm2d(36), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 36, 4),
    )  # fmt: skip


def vit() -> nn.Module:
    model: nn.Module = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4
    )
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "vit": vit,
}


def pictures(
    classes: tuple[int, ...] = (0, 1, 2, 3), dtype: torch.dtype = torch.float32
) -> Batches:
    """48 pictures on the GPU: noise around one pattern for each class."""
    random = torch.Generator().manual_seed(classes[0])
    patterns = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(48) % len(classes) + classes[0]
    noisy = patterns[labels] + torch.randn(48, 3, 16, 16, generator=random)
    inputs = (0.5 + 0.1 * noisy).clamp(0, 1)
    return [
        (part.to(DEVICE, dtype), known.to(DEVICE))
        for part, known in zip(inputs.split(16), labels.split(16), strict=True)
    ]


def ready(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE, dtype)
    return settled(model, torch.cat([inputs for inputs, _ in pictures(dtype=dtype)]))


def on_cpu(data: Batches) -> Batches:
    return [(inputs.cpu(), labels.cpu()) for inputs, labels in data]


def half_of(model: nn.Module) -> Slice:
    return profile(model, pictures(), progress=False).slice(ratio=0.5)


@pytest.mark.parametrize("metric", metrics_known())
@pytest.mark.parametrize("name", MODELS)
def test_a_profile_is_that_of_a_cpu(name: str, metric: str) -> None:
    model = ready(name, torch.float64)
    data = pictures(dtype=torch.float64)
    found = profile(model, data, metrics=(metric,), progress=False)
    wanted = profile(copy.deepcopy(model).cpu(), on_cpu(data), metrics=(metric,), progress=False)
    for theta in (0.8, 0.95):
        mine, theirs = found.slice(theta).kept, wanted.slice(theta).kept
        assert mine.keys() == theirs.keys()
        for layer, mask in mine.items():
            assert torch.equal(mask.cpu(), theirs[layer])


@pytest.mark.parametrize("name", MODELS)
def test_removal_and_folding_are_those_of_a_cpu(name: str) -> None:
    model = ready(name, torch.float64)
    data = pictures(dtype=torch.float64)
    critical = profile(model, data, progress=False).slice(ratio=0.5)
    inputs = data[0][0]
    for folding in (False, True):
        here, there = copy.deepcopy(model), copy.deepcopy(model).cpu()
        if folding:
            fold(here, critical, consumer_statistics(here, data, critical.groups))
            fold(there, critical, consumer_statistics(there, on_cpu(data), critical.groups))
        remove(here, critical, inputs)
        remove(there, critical, inputs.cpu())
        with torch.no_grad():
            torch.testing.assert_close(here(inputs).cpu(), there(inputs.cpu()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"theta": 0.9},
        {"pruning_ratio": 0.5, "global_pruning": True},
        {"macs_budget": 0.6, "recalibrate": True, "balance": True},
        {"params_budget": 0.6, "fold": "refit"},
        {"latency_budget": 0.9},
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_the_pruned_model_runs_where_it_was(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    model, data = ready(name), pictures()
    inputs = data[0][0]
    before = sum(parameter.numel() for parameter in model.parameters())
    NSSPruner(model, inputs, data=data, progress=False, **arguments).step()
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert {parameter.device.type for parameter in model.parameters()} == {DEVICE}
    with torch.no_grad():
        outputs = model(inputs)
        save_pruned(model, tmp_path / "pruned.pt")
        again = load_pruned(tmp_path / "pruned.pt", MODELS[name]()).to(DEVICE).eval()
        assert torch.equal(again(inputs), outputs)


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_frozen_keeps_its_bits(name: str, optimizer: str, amp: torch.dtype | None) -> None:
    model = ready(name)
    critical = half_of(model)
    before = bits(model)
    trainer = ReadaptTrainer(model, critical, "pgd", 0.03, progress=False)
    trainer.fit(
        pictures(), optimizer=optimizer, learning_rate=0.01, weight_decay=0.1, epochs=4, amp=amp,
        clip_norm=1.0,
    )  # fmt: skip
    trains = entries_with_names(
        model, critical_entries(critical, model), critical_channels(critical, model)
    )
    assert_only_these_moved(model, before, trains)


@pytest.mark.parametrize("name", MODELS)
def test_a_resumed_training_ends_like_one_that_was_not_stopped(name: str, tmp_path: Path) -> None:
    # In float64, as a GPU adds in no fixed order and the sign of a gradient makes much of it.
    critical = half_of(ready(name))
    ends = []
    for stops in ((4,), (2, 4)):
        model = ready(name, torch.float64)
        path = tmp_path / f"{len(stops)}.pt"
        for epochs in stops:
            torch.manual_seed(1)
            ReadaptTrainer(model, critical, "fgsm", 0.03, progress=False).fit(
                pictures(dtype=torch.float64), optimizer="sgd", learning_rate=0.01, epochs=epochs,
                checkpoint=path, resume=True,
            )  # fmt: skip
        ends.append(model.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(ends[1][key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", [None, 0.1])
def test_earlier_tasks_keep_their_logits_to_the_bit(
    name: str, optimizer: str, weights: float | None
) -> None:
    model = ready(name)
    inputs = pictures()[0][0]
    trainer = IncrementalTrainer(
        model, data=pictures((0, 1)), classes=(0, 1), keep=0.3, keep_weights=weights, progress=False
    )
    with trainer.task_a() as masked, torch.no_grad():
        known = masked(inputs)[:, :2].clone()
    for classes in ((2, 3), (4, 5)):
        trainer.fit(pictures(classes), epochs=2, optimizer=optimizer, weight_decay=0.1)
        trainer.finetune_masked(epochs=1, optimizer=optimizer)
        with trainer.task(0, masked=True) as masked, torch.no_grad():
            assert torch.equal(masked(inputs)[:, :2], known)


@pytest.mark.parametrize("name", MODELS)
def test_similar_layers_are_those_of_a_cpu(name: str) -> None:
    model = ready(name, torch.float64)
    data = pictures(dtype=torch.float64)
    found = DeepArc(model, data, threshold=0.5, progress=False)
    wanted = DeepArc(copy.deepcopy(model).cpu(), on_cpu(data), threshold=0.5, progress=False)
    assert found.redundant == wanted.redundant
    assert found.similarity == pytest.approx(wanted.similarity)


@pytest.mark.parametrize("method", ["lamp", "erk", "uniform+", "global"])
def test_weights_are_pruned_as_on_a_cpu(method: str) -> None:
    model = ready("cnn")
    copied = copy.deepcopy(model).cpu()
    sparsify(model, 0.5, method)
    sparsify(copied, 0.5, method)
    for (name, mine), theirs in zip(model.named_buffers(), copied.buffers(), strict=True):
        if name.endswith("_mask"):
            assert torch.equal(mine.cpu(), theirs), name
    rounds = list(iterative_sparsify(ready("cnn"), 0.2, method, until=Iterations(3)))
    assert len(rounds) == 3
