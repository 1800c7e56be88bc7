"""What a task has learned stays, to the bit; what is free learns the next."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from networks import assert_unchanged, fingerprint, mlp
from nss_prune.adaptation.accuracies import AccuracyMatrix
from nss_prune.adaptation.datasets import parts
from nss_prune.adaptation.incremental import THETAS, IncrementalTrainer
from nss_prune.adaptation.isolation import isolated_part
from nss_prune.adaptation.tasks import Task
from nss_prune.adaptation.training import TaskLoss
from nss_prune.discovery.whole import discover
from nss_prune.errors import (
    ArgumentError,
    DataError,
    FileFormatError,
    ModelMismatchError,
    NothingToPruneError,
    NumericalError,
)
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.graph.slices import Slice
from nss_prune.profiling.run import profile
from processes import in_processes

Batches = list[tuple[Tensor, Tensor]]


def small_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 2)
    )


def bn_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def small_vit() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        depth=2,
        embed_dim=24,
        num_heads=2,
        num_classes=2,
    )
    return model


def resnet() -> nn.Module:
    """A ResNet's stem and first two stages, of a block each."""
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 2)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mlp": (small_mlp, 4),
    "cnn": (bn_cnn, 8),
    "resnet": (resnet, 8),
    "vit": (small_vit, 16),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def pictures(
    classes: tuple[int, ...], size: int = 4, samples: int = 32, deviation: float = 0.5
) -> Batches:
    """Noise around one pattern for each class."""
    generator = torch.Generator().manual_seed(classes[0])
    patterns = torch.randn(10, 3, size, size, generator=torch.Generator().manual_seed(7))
    labels = torch.tensor([classes[i % len(classes)] for i in range(samples)])
    noise = deviation * torch.randn(samples, 3, size, size, generator=generator)
    return list(zip((patterns[labels] + noise).split(8), labels.split(8), strict=True))


def trained(
    model: nn.Module,
    data: Batches,
    epochs: int = 5,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    for inputs, labels in data * epochs:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def trained_mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return trained(small_mlp(), pictures((0, 1)))


def trainer_of(model: nn.Module, theta: float = 0.9, **arguments: Any) -> IncrementalTrainer:
    return IncrementalTrainer(
        model, data=pictures((0, 1)), theta=theta, progress=False, **arguments
    )


@torch.no_grad()
def scores(trainer: IncrementalTrainer, task: int, inputs: Tensor) -> Tensor:
    """A task's own scores under its mask."""
    with trainer.task(task, masked=True) as model:
        return model(inputs)[:, list(trainer.tasks[task].classes)].clone()


def started(name: str) -> tuple[nn.Module, Batches, Tensor]:
    """A model trained on a first task, the task's data, and other pictures."""
    torch.manual_seed(0)
    make, size = MODELS[name]
    first = pictures((0, 1), size, samples=16)
    model = trained(make(), first, epochs=1)
    return model, first, torch.randn(9, 3, size, size)


def accuracy(model: nn.Module, data: Batches) -> float:
    with torch.no_grad():
        right = [model(inputs).argmax(1) == labels for inputs, labels in data]
    return float(torch.cat(right).float().mean())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_earlier_tasks_keep_their_logits_to_the_bit(name: str, optimizer: str) -> None:
    model, first, inputs = started(name)
    trainer = IncrementalTrainer(model, data=first, theta=0.9, progress=False)
    with trainer.tasks[0].slice.masked(model.eval()), torch.no_grad():
        known = [model(inputs).clone()]
    for classes in ((2, 3), (4, 5), (6, 7)):
        before = copy.deepcopy(model)
        data = pictures(classes, inputs.shape[-1], samples=16)
        trainer.fit(data, epochs=2, optimizer=OPTIMIZERS[optimizer])
        for task, expected in enumerate(known):
            assert torch.equal(scores(trainer, task, inputs), expected)
        assert (before(inputs) - model(inputs)[:, : classes[0]]).abs().max() > 0
        known.append(scores(trainer, len(known), inputs))


def test_only_entries_that_are_not_critical_on_both_sides_train() -> None:
    model = trained_mlp()
    before = copy.deepcopy(model.state_dict())
    trainer = trainer_of(model)
    kept = trainer.tasks[0].slice.kept
    trainer.fit(pictures((2, 3)), epochs=1)
    rows = {
        "1": kept["1"].tolist(),
        "3": kept["3"].tolist(),
        "5": [True, True, False, False],
    }
    columns = {"1": [True] * 48, "3": rows["1"], "5": rows["3"]}
    after = model.state_dict()
    for layer, moved in (("1", True), ("3", True), ("5", False)):
        old, new = before[f"{layer}.weight"], after[f"{layer}.weight"]
        others = 0
        for i in range(len(old)):
            if rows[layer][i]:
                assert after[f"{layer}.bias"][i] == before[f"{layer}.bias"][i]
            for j in range(old.shape[1]):
                if rows[layer][i] and columns[layer][j]:
                    assert new[i, j] == old[i, j]
                else:
                    others += int(new[i, j] != old[i, j])
        assert (others > 0) == moved  # the new task's loss does not see the rows of the first


def test_the_new_task_is_learned_and_the_whole_network_is_its_model() -> None:
    trainer = trainer_of(trained_mlp())
    trainer.fit(pictures((2, 3)), epochs=10, learning_rate=0.01)
    with trainer.task_b() as model:
        assert accuracy(model, pictures((2, 3))) == 1
        inputs = pictures((2, 3))[0][0]
        inside = model(inputs)
    assert torch.equal(inside[:, 2:], trainer.model.eval()(inputs)[:, 2:])
    assert (inside[:, :2] == -math.inf).all()
    with trainer.task_a() as model:
        assert accuracy(model, pictures((0, 1))) > 0.9


def slower(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Half of a network without its other half is easily thrown off."""
    for group in optimizer.param_groups:
        group["lr"] /= 10
    return optimizer


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_finetuning_changes_what_the_last_task_needs_alone(name: str, optimizer: str) -> None:
    model, first, inputs = started(name)
    trainer = IncrementalTrainer(model, data=first, keep=0.5, progress=False)
    for mask in trainer.tasks[0].slice.kept.values():
        assert int(mask.sum()) == round(0.5 * len(mask))
    arguments = {"epochs": 2, "optimizer": lambda p: slower(OPTIMIZERS[optimizer](p))}
    before = model.eval()(inputs)
    trainer.finetune_masked(**arguments)
    assert (model.eval()(inputs) - before).abs().max() > 0
    known = [scores(trainer, 0, inputs)]
    for classes in ((2, 3), (4, 5)):
        trainer.keep = None
        trainer.theta = 0.9
        trainer.fit(pictures(classes, inputs.shape[-1], samples=16), **arguments)
        trainer.finetune_masked(**arguments)
        for task, expected in enumerate(known):
            assert torch.equal(scores(trainer, task, inputs), expected)
        with trainer.task(-1, masked=True), torch.no_grad():
            known.append(scores(trainer, len(known), inputs))


def test_a_small_slice_is_finetuned_to_do_the_task_alone() -> None:
    data = pictures((0, 1), samples=400, deviation=5.0)
    model = trained(small_mlp(), data)
    trainer = IncrementalTrainer(model, data=data, keep=0.1, progress=False)
    with trainer.task_a() as masked:
        before = accuracy(masked, data)
    trainer.finetune_masked(epochs=10, learning_rate=0.01)
    with trainer.task_a() as masked:
        assert accuracy(masked, data) > before + 0.05


def test_a_task_that_is_finetuned_answers_with_its_mask(tmp_path: Path) -> None:
    trainer = trainer_of(trained_mlp(), keep_weights=0.1)
    trainer.fit(pictures((2, 3)), epochs=2)
    inputs = torch.randn(9, 3, 4, 4)
    masked = scores(trainer, 1, inputs)
    with trainer.task_b() as model:
        assert not torch.equal(model(inputs)[:, 2:4], masked)
    trainer.finetune_masked(epochs=2)
    trainer.tasks[1].save(tmp_path / "task")
    later = IncrementalTrainer(
        trainer.model, tasks=[trainer.tasks[0], Task.load(tmp_path / "task")], progress=False
    )
    settled = scores(trainer, 1, inputs)
    assert not torch.equal(settled, masked)
    for known in (trainer, later):
        with known.task_b() as model:
            assert torch.equal(model(inputs)[:, 2:4], settled)


def test_finetuning_fails_without_a_trace() -> None:
    model = trained_mlp()
    data = pictures((0, 1))
    trainer = IncrementalTrainer(model, trainer_of(model).tasks[0].slice, progress=False)
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match="not known"):
        trainer.finetune_masked()
    with pytest.raises(ArgumentError, match="epochs"):
        trainer.finetune_masked(data, epochs=0)
    with pytest.raises(NumericalError):
        trainer.finetune_masked(data, loss=lambda outputs, labels: outputs.sum(1) * math.nan)
    assert_unchanged(model, before)


def test_the_names_before_still_work() -> None:
    trainer, other = trainer_of(trained_mlp()), trainer_of(trained_mlp())
    torch.manual_seed(1)
    with pytest.warns(DeprecationWarning, match="finetune_masked"):
        trainer.settle(epochs=1)
    torch.manual_seed(1)
    other.finetune_masked(epochs=1)
    for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    inputs = torch.randn(3, 3, 4, 4)
    with pytest.warns(DeprecationWarning, match="masked_freezing"):
        old = trainer.settling(inputs)
    new = trainer.masked_freezing(inputs)
    assert old.trainable.keys() == new.trainable.keys()
    assert all(torch.equal(old.trainable[name], new.trainable[name]) for name in old.trainable)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_tasks_in_a_share_of_the_weights_keep_their_logits(name: str, optimizer: str) -> None:
    model, first, inputs = started(name)
    trainer = IncrementalTrainer(model, data=first, keep=0.8, keep_weights=0.2, progress=False)
    arguments = {"epochs": 2, "optimizer": lambda p: slower(OPTIMIZERS[optimizer](p))}
    trainer.finetune_masked(**arguments)
    known = [scores(trainer, 0, inputs)]
    for classes in ((2, 3), (4, 5)):
        trainer.fit(pictures(classes, inputs.shape[-1], samples=16), **arguments)
        for task, expected in enumerate(known):
            assert torch.equal(scores(trainer, task, inputs), expected)
        trainer.finetune_masked(**arguments)
        for task, expected in enumerate(known):
            assert torch.equal(scores(trainer, task, inputs), expected)
        known.append(scores(trainer, len(known), inputs))


def weights_by_hand(trainer: IncrementalTrainer) -> dict[str, Tensor]:
    """LAMP's choice of a fifth of all weights of the small MLP, from its definition."""
    (task,) = trainer.tasks
    rows = {name: task.slice.kept[name] for name in ("1", "3")}
    critical = {
        "1.weight": rows["1"][:, None].expand(32, 48),
        "3.weight": rows["3"][:, None] & rows["1"],
    }
    ranked = []
    for name, entries in critical.items():
        squares = trainer.model.get_parameter(name).double().square()
        values = [(squares[i, j].item(), i, j) for i, j in entries.nonzero().tolist()]
        for square, i, j in values:
            not_smaller = sum(other for other, _, _ in values if other >= square)
            ranked.append((square / not_smaller, name, i, j))
    kept = {name: torch.zeros_like(entries) for name, entries in critical.items()}
    for _, name, i, j in sorted(ranked, reverse=True)[: round(0.2 * (32 * 48 + 24 * 32))]:
        kept[name][i, j] = True
    return kept


def test_a_task_keeps_the_best_of_its_weights_and_the_others_train() -> None:
    model = trained_mlp()
    before = copy.deepcopy(model)
    trainer = trainer_of(model, 0.95, keep_weights=0.2)
    expected = weights_by_hand(trainer)
    kept = trainer.tasks[0].weights
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name], expected[name]) for name in kept)
    trainer.fit(pictures((2, 3)), epochs=1)
    for name, mask in kept.items():
        moved = model.get_parameter(name) != before.get_parameter(name)
        assert not moved[mask].any()
        # Rows of neurons that are dead for the new task do not move.
        assert moved[~mask].float().mean() > 0.5
    theirs = trainer.tasks[1].weights
    own = sum(int((theirs[name] & ~kept[name]).sum()) for name in kept)
    assert own == round(0.2 * (32 * 48 + 24 * 32))


def test_a_task_of_a_share_of_the_weights_computes_with_no_others() -> None:
    model = trained_mlp()
    trainer = trainer_of(model, keep_weights=0.1)
    (task,) = trainer.tasks
    before = fingerprint(model)
    smaller = copy.deepcopy(model).eval()
    for name, mask in task.weights.items():
        smaller.get_parameter(name).data[~mask] = 0
    inputs = torch.randn(9, 3, 4, 4)
    with task.slice.masked(smaller), torch.no_grad():
        expected = smaller(inputs)
    assert torch.equal(scores(trainer, 0, inputs), expected)
    with pytest.raises(RuntimeError, match="inside"), task.masked(model):
        raise RuntimeError("inside")
    assert_unchanged(model, before)


def test_free_weights_are_enough_for_another_task() -> None:
    trainer = IncrementalTrainer(
        trained_mlp(), data=pictures((0, 1)), keep=1.0, keep_weights=0.5, progress=False
    )
    inputs = torch.randn(9, 3, 4, 4)
    known = scores(trainer, 0, inputs)
    assert not any(trainer.free.values())
    trainer.fit(pictures((2, 3)), epochs=1)
    assert torch.equal(scores(trainer, 0, inputs), known)
    with pytest.raises(NothingToPruneError, match="share of the weights"):
        trainer.fit(pictures((4, 5)), epochs=1)


def test_tasks_with_weights_are_saved(tmp_path: Path) -> None:
    trainer = trainer_of(trained_mlp(), keep_weights=0.2)
    (task,) = trainer.tasks
    task.save(tmp_path / "task")
    loaded = Task.load(tmp_path / "task")
    assert loaded.weights.keys() == task.weights.keys()
    for name, mask in task.weights.items():
        assert torch.equal(loaded.weights[name], mask)
    other = Task("a", task.slice, (0, 1), 2, {"1.weight": torch.ones(32, 47).bool()})
    with pytest.raises(ModelMismatchError, match=r"1\.weight \(32, 47\)"):
        IncrementalTrainer(trained_mlp(), tasks=[other])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_weights": 0.0}, "keep_weights is 0"),
        ({"keep_weights": 0.5, "method": "best"}, "method is 'best'"),
    ],
)
def test_shares_of_weights_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        trainer_of(trained_mlp(), **arguments)


def test_statistics_of_critical_channels_stay_and_the_others_follow_the_new_task() -> None:
    torch.manual_seed(0)
    data = pictures((0, 1), 8)
    model = trained(bn_cnn(), data)
    trainer = IncrementalTrainer(model, data=data, theta=0.8, progress=False, features="flat")
    kept = trainer.tasks[0].slice.kept["0"]
    before = model[1].running_mean.clone()
    trainer.fit(pictures((2, 3), 8), epochs=1)
    assert torch.equal(model[1].running_mean[kept], before[kept])
    assert (model[1].running_mean[~kept] != before[~kept]).all()


def test_a_head_grows_and_keeps_its_rows() -> None:
    model = trained_mlp()
    rows = model[5].weight.detach().clone()
    trainer = trainer_of(model)
    kept = trainer.tasks[0].slice.kept["3"]
    trainer.fit(pictures((4, 6)), epochs=1)
    assert model[5].out_features == 7
    assert model[5].weight.shape == (7, 24)
    assert torch.equal(model[5].weight[:2, kept], rows[:, kept])
    assert trainer.tasks[1].classes == (4, 6)


def test_tasks_that_share_labels_share_rows() -> None:
    trainer = trainer_of(trained_mlp())
    inputs = torch.randn(9, 3, 4, 4)
    before = scores(trainer, 0, inputs)
    others = [(-inputs, labels) for inputs, labels in pictures((0, 1))]
    trainer.fit(others, epochs=10, learning_rate=0.01)
    assert trainer.tasks[1].classes == (0, 1)
    assert torch.equal(scores(trainer, 0, inputs), before)
    with trainer.task_b() as model:
        assert accuracy(model, others) > 0.9


@pytest.mark.parametrize("bound", ["tolerance", "divergence", "entropy"])
def test_theta_goes_down_as_long_as_the_mask_holds(bound: str) -> None:
    torch.manual_seed(0)
    data = pictures((0, 1), samples=400, deviation=5.0)
    model = trained(small_mlp(), data)
    limits = {"tolerance": 1.0, "divergence": math.inf}
    if bound != "tolerance":
        limits = {"tolerance": 100.0, "divergence": 0.01 if bound == "divergence" else 1e-9}
    trainer = IncrementalTrainer(model, data=data, progress=False, **limits)
    held_out, profiled = (list(part) for part in parts(data, 0.2, 0))
    assert sum(len(y) for _, y in held_out) + sum(len(y) for _, y in profiled) == 400
    model.eval()
    whole, wanted = accuracy(model, held_out), probabilities(model, held_out)
    entropy = float(-(wanted * wanted.log()).sum(1).mean())
    most = max(limits["divergence"], 0.05 * entropy)
    assert (most > limits["divergence"]) == (bound == "entropy")
    found = profile(model, profiled, progress=False)
    holds = []
    for theta in THETAS:
        with found.slice(theta).masked(model):
            given = probabilities(model, held_out)
            drift = float((wanted * (wanted / given).log()).sum(1).mean())
            right = accuracy(model, held_out) >= whole - limits["tolerance"] / 100
            holds.append(right and drift <= most)
    passed = holds.index(False)
    assert passed > 0
    expected = found.slice(THETAS[passed - 1])
    for name, kept in trainer.tasks[0].slice.kept.items():
        assert torch.equal(kept, expected.kept[name])


def probabilities(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad():
        scores = torch.cat([model(inputs) for inputs, _ in data])
    return scores[:, :2].double().softmax(1)


def test_a_given_slice_is_used_as_it_is() -> None:
    model = trained_mlp()
    critical = profile(model, pictures((0, 1)), progress=False).slice(ratio=0.3)
    trainer = IncrementalTrainer(model, critical, progress=False)
    assert trainer.tasks[0].slice is critical
    assert trainer.tasks[0].classes == (0, 1)
    assert trainer.free == {name: int((~kept).sum()) for name, kept in critical.kept.items()}


def test_tasks_are_saved_and_training_goes_on_with_them(tmp_path: Path) -> None:
    model = trained_mlp()
    trainer = trainer_of(model)
    trainer.fit(pictures((2, 3)), epochs=1, name="second")
    inputs = torch.randn(5, 3, 4, 4)
    known = [scores(trainer, task, inputs) for task in (0, 1)]
    for position, task in enumerate(trainer.tasks):
        task.save(tmp_path / f"{position}")
    tasks = [Task.load(tmp_path / f"{position}") for position in (0, 1)]
    later = IncrementalTrainer(model, tasks=tasks, theta=0.9, progress=False)
    later.fit(pictures((4, 5)), epochs=1)
    assert [task.name for task in later.tasks] == ["task 1", "second", "task 3"]
    for task in (0, 1):
        assert torch.equal(scores(later, task, inputs), known[task])


def test_a_task_of_vgg16_takes_less_than_10_kilobytes(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = torchvision.models.vgg16_bn(num_classes=10)
    model = model.to_empty(device="cpu")
    model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
    neurons = discover(model, torch.zeros(1, 3, 32, 32))
    generator = torch.Generator().manual_seed(0)
    kept = {g.name: torch.rand(g.size, generator=generator) < 0.5 for g in neurons.groups}
    task = Task("a", Slice(kept, neurons.groups), tuple(range(10)), 10)
    task.save(tmp_path / "task")
    assert (tmp_path / "task").stat().st_size < 10_000
    loaded = Task.load(tmp_path / "task")
    assert loaded.classes == task.classes
    assert all(torch.equal(loaded.slice.kept[name], kept[name]) for name in kept)


def test_a_damaged_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task").write_bytes(b"nothing")
    with pytest.raises(FileFormatError):
        Task.load(tmp_path / "task")


class Raising:
    """Batches that raise in the middle of an epoch."""

    def __init__(self, data: Batches, epoch: int) -> None:
        self.data = data
        self.passes = -1 - epoch  # one pass finds the labels, one takes a batch to try

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        for number, batch in enumerate(self.data):
            if self.passes == 2 and number == 2:
                raise OSError("the disk is gone")
            yield batch


def test_after_a_loader_raised_the_model_is_as_before_and_training_goes_on(
    tmp_path: Path,
) -> None:
    data, path = pictures((2, 3)), tmp_path / "checkpoint"
    straight = trainer_of(trained_mlp())
    torch.manual_seed(1)
    straight.fit(data, epochs=3, optimizer=OPTIMIZERS["sgd"])

    trainer = trainer_of(trained_mlp())
    before = fingerprint(trainer.model)
    torch.manual_seed(1)
    with pytest.raises(OSError, match="disk"):
        trainer.fit(Raising(data, 2), epochs=3, optimizer=OPTIMIZERS["sgd"], checkpoint=path)
    assert_unchanged(trainer.model, before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert len(trainer.tasks) == 1
    assert path.exists()
    trainer.fit(data, epochs=3, optimizer=OPTIMIZERS["sgd"], checkpoint=path, resume=True)
    for one, other in zip(trainer.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weights", [None, 0.2])
def test_finetuning_goes_on_after_a_loader_raised(weights: float | None, tmp_path: Path) -> None:
    data, path = pictures((0, 1)), tmp_path / "checkpoint"
    arguments = {"epochs": 3, "optimizer": OPTIMIZERS["sgd"]}
    straight, trainer = (trainer_of(trained_mlp(), keep_weights=weights) for _ in range(2))
    straight.finetune_masked(data, **arguments)
    before = fingerprint(trainer.model)
    with pytest.raises(OSError, match="disk"):
        trainer.finetune_masked(Raising(data, 1), checkpoint=path, **arguments)
    assert_unchanged(trainer.model, before)
    trainer.finetune_masked(data, checkpoint=path, resume=True, **arguments)
    for one, other in zip(trainer.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_model_or_task_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    trainer_of(trained_mlp()).fit(pictures((2, 3)), epochs=1, checkpoint=path)
    for other, classes in ((trained_mlp(1), (2, 3)), (trained_mlp(), (1, 3))):
        trainer = trainer_of(other)
        before = fingerprint(other)
        with pytest.raises(ModelMismatchError, match="frozen entries|another training"):
            trainer.fit(pictures(classes), checkpoint=path, resume=True)
        assert_unchanged(other, before)


def test_a_loss_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    trainer = trainer_of(trained_mlp())
    before = fingerprint(trainer.model)
    broken = [(inputs * math.nan, labels) for inputs, labels in pictures((2, 3))]
    with pytest.raises(NumericalError, match="learning rate"):
        trainer.fit(broken, epochs=1)
    assert_unchanged(trainer.model, before)


def test_without_a_free_neuron_there_is_nothing_to_learn_with() -> None:
    model = trained_mlp()
    whole = profile(model, pictures((0, 1)), progress=False).slice(ratio=1.0)
    trainer = IncrementalTrainer(model, whole, progress=False)
    before = fingerprint(model)
    with pytest.raises(NothingToPruneError, match="free"):
        trainer.fit(pictures((2, 3)))
    assert_unchanged(model, before)


def test_labels_outside_a_head_that_does_not_grow() -> None:
    trainer = trainer_of(trained_mlp(), grow=False)
    with pytest.raises(DataError, match="classes of the task are 2, 3.*2 outputs"):
        trainer.fit(pictures((2, 3)))


def test_negative_labels_and_labels_that_are_no_classes() -> None:
    trainer = trainer_of(trained_mlp())
    with pytest.raises(DataError, match="-1"):
        trainer.fit([(inputs, labels - 3) for inputs, labels in pictures((2, 3))])
    with pytest.raises(DataError, match="one class index"):
        trainer.fit([(inputs, labels.float()) for inputs, labels in pictures((2, 3))])
    with pytest.raises(DataError, match="no batch"):
        trainer.fit([])


def test_a_slice_or_task_of_another_model_is_refused() -> None:
    other = mlp(48, (9, 7), 2).float()
    critical = profile(other, pictures((0, 1)), progress=False).slice(0.9)
    with pytest.raises(ModelMismatchError, match="profiled"):
        IncrementalTrainer(trained_mlp(), critical)
    task = trainer_of(trained_mlp()).tasks[0]
    with pytest.raises(ModelMismatchError, match="9 outputs"):
        IncrementalTrainer(trained_mlp(), tasks=[Task("a", task.slice, (0, 1), 9)])


def test_a_head_that_is_sliced_makes_no_outputs() -> None:
    model = trained_mlp()
    with pytest.raises(ArgumentError, match="head="):
        trainer_of(model, head=model[3])
    with pytest.raises(ModelMismatchError, match="not in the model"):
        trainer_of(model, head=nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"loss": "none"}, "loss"),
        ({"optimizer": "no such"}, "timm"),
        ({"replay": 1.5}, "share"),
        ({"replay": SubsetRandomSampler([1])}, "DataLoader"),
        ({"name": "task 1"}, "already"),
    ],
)
def test_arguments_outside_what_they_may_be(arguments: dict[str, Any], message: str) -> None:
    trainer = trainer_of(trained_mlp())
    before = fingerprint(trainer.model)
    with pytest.raises(ArgumentError, match=message):
        trainer.fit(pictures((2, 3)), **arguments)
    assert_unchanged(trainer.model, before)


def test_arguments_of_the_trainer() -> None:
    with pytest.raises(ArgumentError, match="slice"):
        IncrementalTrainer(trained_mlp())
    with pytest.raises(ArgumentError, match="theta"):
        trainer_of(trained_mlp(), theta=2.0)
    with pytest.raises(ArgumentError, match="tolerance"):
        trainer_of(trained_mlp(), tolerance=-1)
    with pytest.raises(DataError, match="0, 9"):
        trainer_of(trained_mlp(), classes=(9, 0))
    with pytest.raises(DataError, match="only once"):
        IncrementalTrainer(trained_mlp(), data=iter(pictures((0, 1))))
    with pytest.raises(DataError, match="0, 5.*0 to 1"):
        IncrementalTrainer(trained_mlp(), data=pictures((0, 5)), progress=False)
    with pytest.raises(ArgumentError, match="no task 1"):
        trainer_of(trained_mlp()).task_b().__enter__()


def test_inference_leaves_modes_flags_and_hooks_as_they_were() -> None:
    trainer = trainer_of(trained_mlp())
    trainer.model.train()
    before = fingerprint(trainer.model)
    with trainer.task_a() as model:
        assert not model.training
    assert_unchanged(trainer.model, dict(before))
    with pytest.raises(RuntimeError), trainer.task_a() as model:
        model(torch.randn(2, 7))
    assert_unchanged(trainer.model, before)


@pytest.mark.parametrize("form", ["share", "sampler", "batches"])
def test_replay_teaches_the_whole_network_earlier_tasks(form: str) -> None:
    model = trained_mlp()
    inputs = torch.cat([batch[0] for batch in pictures((0, 1))])
    labels = torch.cat([batch[1] for batch in pictures((0, 1))])
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8, shuffle=True)
    trainer = IncrementalTrainer(model, data=loader, theta=0.9, progress=False)
    before = scores(trainer, 0, inputs)
    replay: Any = {
        "share": 0.5,
        "sampler": SubsetRandomSampler(range(16)),
        "batches": pictures((0, 1))[:2],
    }[form]
    trainer.fit(pictures((2, 3)), replay=replay, epochs=20, loss="all", learning_rate=0.01)
    assert torch.equal(scores(trainer, 0, inputs), before)
    model.eval()
    assert accuracy(model, pictures((0, 1))) > 0.9
    assert accuracy(model, pictures((2, 3))) > 0.9


def test_a_batch_has_its_own_samples_and_replayed_ones() -> None:
    trainer = trainer_of(trained_mlp())
    seen: list[list[int]] = []

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.tolist())
        return functional.cross_entropy(outputs, labels, reduction="none")

    replay = [(torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 1]))]
    trainer.fit(pictures((2, 3), samples=16), replay=replay, epochs=1, loss=loss)
    assert seen[:4] == [[2, 3] * 4, [0, 1, 1], [2, 3] * 4, [0, 1, 1]]


def test_nothing_to_replay() -> None:
    trainer = trainer_of(trained_mlp())
    with pytest.raises(DataError, match="replay"):
        trainer.fit(pictures((2, 3)), replay=[])


def test_parts_of_a_loader_are_of_its_sampler_and_the_same_in_every_pass() -> None:
    values = torch.arange(40.0)[:, None]
    loader = DataLoader(
        TensorDataset(values, torch.zeros(40, dtype=torch.long)),
        batch_size=4,
        sampler=SubsetRandomSampler(range(20)),
    )
    first, rest = parts(loader, 0.25, seed=3)
    drawn = [[float(x) for inputs, _ in part for x in inputs] for part in (first, rest, first)]
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[2]
    assert sorted(drawn[0] + drawn[1]) == list(range(20))


def test_parts_of_a_loader_with_a_sampler_of_batches_have_batches_of_its_size() -> None:
    dataset = TensorDataset(torch.arange(40.0)[:, None], torch.zeros(40, dtype=torch.long))
    loader = DataLoader(dataset, batch_sampler=[range(8), range(8, 16), range(16, 20)])
    first, rest = ([len(labels) for _, labels in part] for part in parts(loader, 0.25, seed=3))
    assert first == [2, 2, 1]
    assert rest == [8, 7]


def test_a_name_by_default_is_none_that_is_taken() -> None:
    trainer = trainer_of(trained_mlp())
    trainer.fit(pictures((2, 3)), epochs=1, name="task 3")
    assert trainer.fit(pictures((4, 5)), epochs=1).name == "task 4"


def test_the_loss_of_a_task_is_cross_entropy_over_its_classes() -> None:
    outputs = torch.randn(5, 7, dtype=torch.float64)
    labels = torch.tensor([5, 1, 1, 4, 5])
    found = TaskLoss((5, 1, 4))(outputs, labels)
    for i, label in enumerate(labels.tolist()):
        competing = sum(math.exp(outputs[i, c]) for c in (1, 4, 5))
        assert found[i].item() == pytest.approx(math.log(competing) - outputs[i, label].item())
    with pytest.raises(DataError, match="labels .2. are none"):
        TaskLoss((5, 1, 4))(outputs, labels.clamp(max=2))


def test_the_task_of_a_sample_is_the_one_that_is_least_uncertain() -> None:
    trainer = trainer_of(trained_mlp())
    trainer.fit(pictures((2, 3, 4)), epochs=10, learning_rate=0.01)
    inputs = torch.cat([pictures((0, 1))[0][0], pictures((2, 3, 4))[0][0]])
    chosen = trainer.infer_task(inputs, by="entropy")
    predicted = trainer.predict(inputs, by="entropy")
    for i, sample in enumerate(inputs):
        entropies, classes = [], []
        for position, task in enumerate(trainer.tasks):
            with trainer.task(position) as model, torch.no_grad():
                own = model(sample[None])[0, list(task.classes)].double()
            p = own.exp() / own.exp().sum()
            entropies.append(-float((p * p.log()).sum()) / math.log(len(p)))
            classes.append(task.classes[int(own.argmax())])
        best = entropies.index(min(entropies))
        assert chosen[i] == best
        assert predicted[i] == classes[best]
    assert set(trainer.predict(inputs, task="task 1").tolist()) <= {0, 1}


class Gated(nn.Module):
    """What ``first`` makes is read by ``second``, and its mean scales the outputs beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 16), nn.Linear(16, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.flatten(1)).relu()
        return self.head(self.second(hidden).relu() * hidden.mean(1, keepdim=True))


def half_of_gated() -> Slice:
    """Of each layer every other neuron; the gate is no member, so that no mask cuts it."""
    groups = []
    for name, size, consumer in (("first", 16, "second"), ("second", 12, "head")):
        every = torch.arange(size)
        members = [
            Member(key, side, every, every, size) for key, side in ((name, "out"), (consumer, "in"))
        ]
        groups.append(NeuronGroup(name, size, tuple(members)))
    kept = {group.name: torch.arange(group.size) % 2 == 0 for group in groups}
    return Slice(kept, tuple(groups))


def test_layers_of_which_a_mask_cuts_all_paths_are_told_from_others() -> None:
    model, critical = Gated().train(), half_of_gated()
    before = fingerprint(model)
    found = isolated_part(critical, model, torch.randn(3, 3, 4, 4))
    assert_unchanged(model, before)
    assert found.kept.keys() == {"second"}
    assert torch.equal(found.kept["second"], critical.kept["second"])
    whole = profile(trained_mlp(), pictures((0, 1)), progress=False).slice(ratio=0.5)
    part = isolated_part(whole, small_mlp(), torch.randn(3, 3, 4, 4))
    assert part.kept.keys() == whole.kept.keys()


def test_a_mask_that_leaves_a_path_uncut_frees_none_of_its_neurons() -> None:
    torch.manual_seed(0)
    model, critical = trained(Gated(), pictures((0, 1))), half_of_gated()
    inputs = torch.randn(9, 3, 4, 4)
    trainer = IncrementalTrainer(model, critical, classes=(0, 1))
    known = scores(trainer, 0, inputs)
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with trainer.freezing(inputs).attach(optimizer):
        trained(model, pictures((2, 3)), optimizer=optimizer)
    after, kept = model.state_dict(), critical.kept["second"]
    for name in ("first.weight", "first.bias"):
        assert torch.equal(after[name], before[name])
    for name in ("second.weight", "second.bias"):
        assert torch.equal(after[name][kept], before[name][kept])
        assert (after[name][~kept] != before[name][~kept]).any()
    assert torch.equal(scores(trainer, 0, inputs), known)


def test_a_training_loop_of_ones_own() -> None:
    torch.manual_seed(0)
    model = trained(small_mlp(), pictures((0, 1)))
    model[5] = nn.Linear(24, 4)
    trained(model, pictures((0, 1)))
    trainer = trainer_of(model)
    inputs = torch.randn(5, 3, 4, 4)
    known = scores(trainer, 0, inputs)
    before = fingerprint(model)
    freezing = trainer.freezing(inputs)
    assert_unchanged(model, before)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with freezing.attach(optimizer):
        trained(model, pictures((2, 3)), 10, optimizer)
    trainer.add(pictures((2, 3)), "second")
    assert torch.equal(scores(trainer, 0, inputs), known)
    with trainer.task("second") as learned:
        assert accuracy(learned, pictures((2, 3))) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fit_is_a_loop_in_which_gradients_of_frozen_entries_are_zero(optimizer: str) -> None:
    torch.manual_seed(0)
    model = trained(bn_cnn(), pictures((0, 1), 8))
    model[8] = nn.Linear(16, 4)
    by_hand, data = copy.deepcopy(model), pictures((2, 3), 8)
    trainers = [
        IncrementalTrainer(m, data=pictures((0, 1), 8), theta=0.9, progress=False)
        for m in (model, by_hand)
    ]
    trainers[0].fit(data, epochs=3, loss="all", optimizer=OPTIMIZERS[optimizer])
    updates = OPTIMIZERS[optimizer](by_hand.parameters())
    with trainers[1].freezing(data[0][0]).attach(updates):
        trained(by_hand, data, 3, updates)
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_accuracy_matrix_and_forgetting_are_those_on_paper() -> None:
    matrix = AccuracyMatrix()
    matrix = matrix.with_row(["a"], [0.9])
    matrix = matrix.with_row(["a", "b"], [0.5, 0.7])
    matrix = matrix.with_row(["a", "b"], [0.6, 0.8])  # b was trained on
    matrix = matrix.with_row(["a", "b", "c"], [0.7, 0.9, 0.4])
    assert matrix.rows == ((0.9,), (0.6, 0.8), (0.7, 0.9, 0.4))
    assert matrix.average == pytest.approx(2 / 3)
    assert matrix.forgetting == pytest.approx((0.2, -0.1))
    assert matrix.average_forgetting == pytest.approx(0.05)
    assert repr(matrix).splitlines()[-1].split() == ["forgot", "20.00", "-10.00"]
    assert math.isnan(AccuracyMatrix().average)


def test_validation_history_and_accuracies_of_tasks() -> None:
    told: list[dict[str, float]] = []
    first, second = pictures((0, 1), samples=24), pictures((2, 3), samples=24)
    trainer = trainer_of(trained_mlp(), validation=first)
    with trainer.task_a() as model:
        assert trainer.accuracies.rows == ((accuracy(model, first),),)
    trainer.fit(
        pictures((2, 3)), second, epochs=6, learning_rate=0.01, scheduler="cosine",
        patience=6, on_epoch=told.append, amp=torch.bfloat16, clip_norm=1.0,
    )  # fmt: skip
    assert tuple(told) == trainer.history
    assert len(told) == 6
    assert told[0]["learning_rate"] > told[-1]["learning_rate"]
    rows = trainer.accuracies.rows
    assert len(rows) == 2
    with trainer.task_a() as model:
        assert rows[1][0] == accuracy(model, first)
    with trainer.task_b() as model:
        assert rows[1][1] == accuracy(model, second) == max(metrics["score"] for metrics in told)
    assert trainer.accuracies.forgetting == (0.0,)  # bit-identical under its mask
    trainer.finetune_masked(epochs=1)
    assert len(trainer.accuracies.rows) == 2


def test_a_task_stops_early_and_its_best_values_come_back() -> None:
    trainer = trainer_of(trained_mlp())
    seen: list[dict[str, Tensor]] = []
    given = iter([0.1, 0.5, 0.4, 0.3, 0.9])

    def validate(model: nn.Module) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(given)

    trainer.fit(pictures((2, 3)), validate, epochs=9, patience=2)
    assert [metrics["score"] for metrics in trainer.history] == [0.1, 0.5, 0.4, 0.3]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, seen[1][name])


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.1}, {"weight_decay": 0.1}, {"optimizer": "sgd"}, {"loss": "all"}]
)
def test_a_checkpoint_of_other_hyper_parameters_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    trainer_of(trained_mlp()).fit(pictures((2, 3)), epochs=1, checkpoint=path)
    trainer = trainer_of(trained_mlp())
    before = fingerprint(trainer.model)
    with pytest.raises(ModelMismatchError, match="another training: it has .*, this one"):
        trainer.fit(pictures((2, 3)), epochs=2, checkpoint=path, resume=True, **change)
    assert_unchanged(trainer.model, before)


def test_old_names_work_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="share= is now keep="):
        trainer = trainer_of(trained_mlp(), theta="auto", share=0.5)
    with pytest.warns(DeprecationWarning, match="weights= is now keep_weights="):
        assert trainer_of(trained_mlp(), weights=0.2).keep_weights == 0.2
    assert trainer.keep == 0.5
    with pytest.warns(DeprecationWarning, match="share is now keep"):
        assert trainer.share == 0.5
    with pytest.warns(DeprecationWarning, match="finetune_masked"):
        trainer.settle(epochs=1)
    with pytest.raises(ArgumentError, match="old name"):
        trainer_of(trained_mlp(), share=0.5, keep=0.5)


def shard(data: Batches, rank: int, number: int = 2) -> Batches:
    """The part of every batch that belongs to one of several processes."""
    return [(x[rank::number].contiguous(), y[rank::number].contiguous()) for x, y in data]


def learn(
    model: nn.Module, rank: int = 0, number: int = 1, folder: str | None = None
) -> IncrementalTrainer:
    """Three tasks with all that a trainer does, the last fine-tuned under its mask."""
    data = [shard(pictures(classes), rank, number) for classes in ((0, 1), (2, 3), (4, 5))]
    kept: dict[str, Any] = {"theta": 0.9, "keep_weights": 0.3, "validation": data[0]}
    trainer = IncrementalTrainer(model, data=data[0], progress=False, **kept)
    path = None if folder is None else f"{folder}/training"
    trainer.fit(data[1], data[1], replay=data[0], epochs=2, checkpoint=path)
    trainer.fit(data[2], data[2], epochs=2)
    trainer.finetune_masked(epochs=1)
    return trainer


def learn_shard(rank: int, folder: str) -> None:
    model = trained_mlp()
    torch.manual_seed(rank)  # rows of new classes are drawn
    trainer = learn(model, rank, 2, folder)
    found = {"state": model.state_dict(), "tasks": trainer.tasks}
    torch.save({**found, "accuracies": trainer.accuracies.rows}, f"{folder}/{rank}")
    fail_in_one(rank)
    learn_unequal(rank)


class FailingOnce:
    """Batches of which the last cannot be read, in the pass of that number."""

    def __init__(self, data: Batches, number: int) -> None:
        self.data = data
        self.left = number

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.left -= 1
        for position, batch in enumerate(self.data):
            if not self.left and position == len(self.data) - 1:
                raise FileNotFoundError("the last picture is gone")
            yield batch


def fail_in_one(rank: int) -> None:
    """Whichever pass fails in one process, both raise, and the models are as before."""
    failed = 0
    for number in range(1, 20):
        trainer = trainer_of(trained_mlp())
        before = fingerprint(trainer.model)
        data = shard(pictures((2, 3)), rank)
        given = FailingOnce(data, number if rank else 100)
        try:
            trainer.fit(given, epochs=2)
        except FileNotFoundError:
            assert_unchanged(trainer.model, before)
            assert len(trainer.tasks) == 1
            failed += 1
        left = [None, None]
        torch.distributed.all_gather_object(left, given.left)
        if left[1] > 0:
            break
    assert failed >= 5  # the classes, the epochs, the profile, the features


def learn_unequal(rank: int) -> None:
    """Shards of unequal length, and an empty one."""
    for sizes in ((1, 4), (4, 0)):
        trainer = trainer_of(trained_mlp(), theta="auto")
        task = trainer.fit(pictures((2, 3))[: sizes[rank]], epochs=1, clip_norm=1.0)
        found = [*trainer.model.state_dict().values(), *task.slice.kept.values()]
        state = torch.cat([value.float().flatten() for value in found])
        both = [torch.empty_like(state) for _ in range(2)]
        torch.distributed.all_gather(both, state)
        assert torch.equal(*both)


def test_processes_learn_the_same_tasks_as_one(tmp_path: Path) -> None:
    in_processes(learn_shard, tmp_path)
    first, second = (torch.load(tmp_path / name, weights_only=False) for name in "01")
    assert (tmp_path / "training").exists()
    model = trained_mlp()
    torch.manual_seed(0)
    alone = learn(model)
    assert first["accuracies"] == second["accuracies"]
    for found, other, wanted in zip(first["tasks"], second["tasks"], alone.tasks, strict=True):
        for one, two in ((found, other), (found, wanted)):
            assert (one.classes, one.finetuned) == (two.classes, two.finetuned)
            assert all(torch.equal(kept, two.slice.kept[n]) for n, kept in one.slice.kept.items())
            assert all(torch.equal(kept, two.weights[n]) for n, kept in one.weights.items())
        assert found.features.layers == other.features.layers
        for part in ("means", "whitening"):
            one, two = (getattr(task.features.found, part) for task in (found, other))
            assert torch.equal(one, two)
    for name, value in model.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-5, atol=1e-6)
