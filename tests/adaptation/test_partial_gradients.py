"""Training blocks of parameters gives what masks give, and touches nothing that is frozen."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_freezing import sliced
from test_readapt import Batches, learned, stripes
from timm.optim import Lamb
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from frozen import assert_only_these_moved, bits, entries_with_names
from networks import assert_unchanged, fingerprint
from nss_prune.adaptation import partial_gradients
from nss_prune.adaptation.adversarial_loss import AdversarialLoss
from nss_prune.adaptation.adversarial_training import AdversarialTraining
from nss_prune.adaptation.freezing import (
    Freezing,
    critical_channels,
    critical_entries,
    train_critical,
    train_others,
)
from nss_prune.adaptation.partial_gradients import BlockTraining, extract_blocks
from nss_prune.adaptation.readapt import ReadaptTrainer
from nss_prune.errors import ModelMismatchError
from nss_prune.training.settings import TrainingSettings
from processes import in_processes

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda model: AdamW(model.parameters(), 1e-3, weight_decay=0.1),
}
MODELS = ["mlp", "cnn", "vit", "tied", "norm with activation"]


@pytest.fixture(autouse=True)
def _small_parameters_have_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the models here are small."""
    monkeypatch.setattr(partial_gradients, "SMALL", 0)


def test_small_parameters_train_under_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5))
    rows = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in
            model.named_parameters()}  # fmt: skip
    for mask in rows.values():
        mask[:3] = True
    monkeypatch.setattr(partial_gradients, "SMALL", 600)
    update = OPTIMIZERS["sgd"](model)
    blocks = extract_blocks(Freezing(model, rows), update)
    assert list(blocks) == ["0.weight"]  # of 600 entries; the others have 20, 100 and 5
    assert model[1].weight in set(update.param_groups[0]["params"])


def compact(freezing: Freezing, optimizer: Optimizer) -> BlockTraining:
    return BlockTraining(freezing, optimizer, extract_blocks(freezing, optimizer))


def train(
    training: BlockTraining,
    inputs: Tensor,
    labels: Tensor,
    steps: int,
    *,
    amp: bool = False,
    clip: float | None = None,
) -> None:
    model = training.freezing.model.train()
    with training.attach():
        for step in range(steps):
            training.optimizer.zero_grad()
            with training.block_gradients():
                with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                    outputs = model(inputs + 0.1 * step)
                cross_entropy(outputs.to(inputs.dtype), labels).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(training.parameters(), clip)
            training.optimizer.step()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_blocks_end_at_the_values_that_masks_give(
    name: str, optimizer: str, clip: float | None
) -> None:
    states = []
    for cut in (extract_blocks, lambda *_: {}):
        model, critical, inputs, labels = sliced(name)
        freezing = train_critical(critical, model.double())
        update = OPTIMIZERS[optimizer](model)
        training = BlockTraining(freezing, update, cut(freezing, update))
        train(training, inputs.double(), labels, 10, clip=clip)
        states.append(bits(model))
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("optimizer", "amp"), [("sgd", False), ("adamw", False), ("sgd", True)])
def test_frozen_entries_keep_their_bits(name: str, optimizer: str, amp: bool) -> None:
    model, critical, inputs, labels = sliced(name)
    before = bits(model)
    training = compact(train_critical(critical, model), OPTIMIZERS[optimizer](model))
    train(training, inputs, labels, 100, amp=amp)
    trains = entries_with_names(
        model, critical_entries(critical, model), critical_channels(critical, model)
    )
    assert_only_these_moved(model, before, trains)


def test_bfloat16_blocks_have_the_gradients_that_autocast_gives_the_whole() -> None:
    model, critical, inputs, labels = sliced("mlp")
    training = compact(train_critical(critical, model), OPTIMIZERS["sgd"](model))
    gradients = []
    for context in (training.block_gradients, torch.enable_grad):
        with training.attach(), context(), torch.autocast("cpu", torch.bfloat16):
            cross_entropy(model(inputs).float(), labels).backward()
        gradients.append([value.grad for value in training.parameters()])
        training.optimizer.zero_grad()
    for mine, wanted in zip(*gradients, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, wanted, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (6,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("full", [None, 0, 1])
def test_a_block_gets_its_part_of_the_gradient(
    shape: tuple[int, ...], bias: bool, full: int | None
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=bias).double()
    rows, columns = torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([0, 1, 1, 0, 1, 1]).bool()
    if full is not None:
        (rows, columns)[full].fill_(True)
    trains = {"weight": rows[:, None] & columns} | ({"bias": rows} if bias else {})
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    toward = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    wanted = torch.autograd.grad((layer(inputs) * toward).sum(), [inputs, *layer.parameters()])
    training = compact(Freezing(layer, trains), SGD(layer.parameters(), 0.1))
    with training.attach(), training.block_gradients():
        (layer(inputs) * toward).sum().backward()
        assert layer.weight.grad is None
        found = [value.grad for value in training.parameters()]
    torch.testing.assert_close(inputs.grad, wanted[0])
    torch.testing.assert_close(found[0], wanted[1][rows][:, columns])
    if bias:
        torch.testing.assert_close(found[1], wanted[2][rows])


CONVOLUTIONS = {
    "1d": lambda **options: nn.Conv1d(20, 35, 15, stride=2, padding=3, **options),
    "2d": lambda **options: nn.Conv2d(35, 20, (3, 5), padding=(0, 2), dilation=(2, 1), **options),
    "3d": lambda **options: nn.Conv3d(35, 18, (1, 3, 3), stride=(1, 2, 1), **options),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("full", [None, 0, 1])
def test_a_convolution_computes_the_gradient_of_its_block_alone(
    kind: str, bias: bool, full: int | None
) -> None:
    torch.manual_seed(0)
    layer = CONVOLUTIONS[kind](bias=bias).double()
    rows, columns = (torch.arange(size) % 3 == 1 for size in layer.weight.shape[:2])
    if full is not None:
        (rows, columns)[full].fill_(True)
    shape = [3, layer.in_channels] + [1] * (layer.weight.dim() - 2)
    block = (rows[:, None] & columns).reshape(len(rows), len(columns), *shape[2:])
    trains = {"weight": block.expand_as(layer.weight)} | ({"bias": rows} if bias else {})
    size = [3, layer.in_channels, *(2 * side + 3 for side in layer.kernel_size)]
    inputs = torch.randn(size, dtype=torch.float64, requires_grad=True)
    outputs = layer(inputs)
    toward = torch.randn_like(outputs)
    wanted = torch.autograd.grad((outputs * toward).sum(), [inputs, *layer.parameters()])
    training = compact(Freezing(layer, trains), SGD(layer.parameters(), 0.1))
    with training.attach(), training.block_gradients():
        arrived = []
        found_outputs = layer(inputs)
        layer.weight.register_hook(arrived.append)
        (found_outputs * toward).sum().backward()
        found = [value.grad for value in training.parameters()]
    assert not arrived
    assert torch.equal(found_outputs, outputs)
    torch.testing.assert_close(inputs.grad, wanted[0])
    torch.testing.assert_close(found[0], wanted[1][rows][:, columns])
    if bias:
        torch.testing.assert_close(found[1], wanted[2][rows])


@pytest.mark.parametrize(
    "options", [{"groups": 5}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_other_convolutions_compute_the_gradient_of_the_whole(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(100, 40, 5, **options).double()
    rows = torch.arange(40) % 3 == 1
    trains = {"weight": rows[:, None, None, None].expand_as(layer.weight)}
    inputs = torch.randn(2, 100, 7, 7, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(layer(inputs).square().sum(), [layer.weight])
    training = compact(Freezing(layer, trains), SGD(layer.parameters(), 0.1))
    with training.attach(), training.block_gradients():
        layer(inputs).square().sum().backward()
        found = training.blocks["weight"].entries.grad
    torch.testing.assert_close(found, wanted[rows])


def test_a_linear_layer_computes_no_gradient_of_its_whole_weight() -> None:
    model, critical, inputs, labels = sliced("mlp")
    training = compact(train_critical(critical, model), OPTIMIZERS["sgd"](model))
    arrived = []
    with training.attach(), training.block_gradients():
        loss = cross_entropy(model(inputs), labels)
        for layer in (model[1], model[3], model[5]):
            layer.weight.register_hook(lambda _, layer=layer: arrived.append(layer))
        loss.backward()
    assert not arrived


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_ones_own_see_the_gradient_of_the_whole(kind: str) -> None:
    model, critical, inputs, labels = sliced("mlp")
    seen: list[torch.Size] = []
    hook = getattr(model[1].weight, kind)(lambda value: seen.append(value.shape))
    training = compact(train_critical(critical, model), OPTIMIZERS["sgd"](model))
    train(training, inputs, labels, 2)
    assert seen == 2 * [model[1].weight.shape]
    hook.remove()


class Twice(nn.Module):
    """A weight that a layer and a bare product both use, one of them recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = checkpoint(self.layer, inputs, use_reentrant=False).relu()
        return self.layer(hidden) + hidden @ self.layer.weight


def test_a_weight_may_be_used_twice_and_recomputed() -> None:
    states = []
    trains = {"layer.weight": torch.arange(6)[:, None] % 2 + torch.arange(6) % 3 == 0}
    for cut in (extract_blocks, lambda *_: {}):
        torch.manual_seed(0)
        model, inputs = Twice().double(), torch.randn(5, 6, dtype=torch.float64)
        freezing, update = Freezing(model, trains), OPTIMIZERS["sgd"](model)
        blocks = cut(freezing, update)
        train(BlockTraining(freezing, update, blocks), inputs, torch.arange(5), 5)
        states.append(bits(model))
    torch.manual_seed(0)
    assert not torch.equal(states[0]["layer.weight"], bits(Twice().double())["layer.weight"])
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key])


def test_a_sparse_gradient_becomes_that_of_the_block() -> None:
    layer = nn.Embedding(5, 4, sparse=True)
    before, columns = layer.weight.detach().clone(), torch.tensor([True, False, True, False])
    freezing = Freezing(layer, {"weight": columns.expand(5, 4).clone()})
    training = compact(freezing, SGD(layer.parameters(), 0.5))
    with training.attach():
        layer(torch.tensor([1, 1, 3])).sum().backward()
        training.optimizer.step()
    wanted = before.clone()
    wanted[:, columns] -= 0.5 * torch.tensor([0.0, 2, 0, 1, 0])[:, None]
    torch.testing.assert_close(layer.weight.detach(), wanted)
    assert torch.equal(layer.weight.detach()[:, ~columns], before[:, ~columns])


def test_a_convolution_keeps_its_memory_format() -> None:
    model, critical, inputs, labels = sliced("cnn")
    model.to(memory_format=torch.channels_last)
    before = bits(model)
    training = compact(train_critical(critical, model), OPTIMIZERS["adamw"](model))
    train(training, inputs.contiguous(memory_format=torch.channels_last), labels, 3)
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)
    trains = entries_with_names(model, critical_entries(critical, model), {})
    assert_only_these_moved(model, before, trains)


def test_the_optimiser_sees_blocks_in_the_groups_of_their_wholes() -> None:
    model, critical, _, _ = sliced("mlp")
    vectors = [value for value in model.parameters() if value.dim() < 2]
    matrices = [value for value in model.parameters() if value.dim() == 2]
    update = SGD([{"params": vectors, "weight_decay": 0.0}, {"params": matrices}], 0.1)
    blocks = extract_blocks(train_critical(critical, model), update)
    entries = critical_entries(critical, model)
    seen = [value for group in update.param_groups for value in group["params"]]
    assert [value.dim() for value in seen] == [1, 1, 1, 2, 2, 2]
    assert sum(value.numel() for value in seen) == sum(int(m.sum()) for m in entries.values())
    assert seen[2] is model[5].bias  # all of it trains
    assert seen[3] is blocks["1.weight"].entries


def test_what_is_no_block_trains_under_masks() -> None:
    model, critical, inputs, labels = sliced("mlp")
    before = bits(model)
    freezing, update = train_others(critical, model), OPTIMIZERS["sgd"](model)
    blocks = extract_blocks(freezing, update)
    assert "3.weight" not in blocks  # rows of the others, and columns of the others
    assert "3.bias" in blocks
    train(BlockTraining(freezing, update, blocks), inputs, labels, 5)
    entries = {name: ~mask for name, mask in critical_entries(critical, model).items()}
    assert_only_these_moved(model, before, iter(entries.items()))


def test_an_optimiser_that_scales_whole_layers_keeps_them() -> None:
    model, critical, _, _ = sliced("mlp")
    update = Lamb(model.parameters(), 0.1)
    assert not extract_blocks(train_critical(critical, model), update)
    assert update.param_groups[0]["params"] == list(model.parameters())


def test_frozen_bits_come_back_whatever_wrote_over_them() -> None:
    model, critical, _, _ = sliced("cnn")
    before = bits(model)
    training = compact(train_critical(critical, model), OPTIMIZERS["sgd"](model))
    with training.attach(), torch.no_grad():
        for value in model.parameters():
            value.add_(1)
    entries = critical_entries(critical, model)
    for name, value in model.named_parameters():
        assert torch.equal(value[~entries[name]], before[name][~entries[name]])
        assert torch.equal(value[entries[name]], (before[name] + 1)[entries[name]])


def test_flags_gradients_and_hooks_are_restored_after_an_exception() -> None:
    model, critical, inputs, labels = sliced("cnn")
    update = OPTIMIZERS["sgd"](model)
    training = compact(train_critical(critical, model), update)
    model[0].weight.requires_grad_(False)
    model[7].weight.grad = gradient = torch.ones_like(model[7].weight)
    model.eval()
    before = fingerprint(model)
    with pytest.raises(RuntimeError), training.attach(), training.block_gradients():
        cross_entropy(model(inputs), labels).backward(torch.ones(2))
    assert_unchanged(model, before)
    assert model[7].weight.grad is gradient
    assert all("forward" not in vars(module) for module in model.modules())
    assert not update._optimizer_step_post_hooks
    assert all(not value._post_accumulate_grad_hooks for value in model.parameters())


def test_clipping_sees_what_trains_only() -> None:
    model, critical, inputs, labels = sliced("cnn")
    model.eval()
    cross_entropy(model(inputs), labels).backward()
    entries = critical_entries(critical, model)
    squares = [
        float((value.grad.double()[entries[name]] ** 2).sum())
        for name, value in model.named_parameters()
    ]
    model.zero_grad()
    training = compact(train_critical(critical, model), OPTIMIZERS["sgd"](model))
    with training.attach(), training.block_gradients():
        cross_entropy(model(inputs), labels).backward()
        norm = nn.utils.clip_grad_norm_(training.parameters(), 1.0)
    assert float(norm) == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)


@pytest.mark.parametrize("attack", ["pgd", None])
def test_the_trainer_cuts_blocks_for_an_optimiser_of_its_own_only(attack) -> None:
    results, values = [], []
    for given in ("name", "function", "optimiser"):
        model, critical = learned()
        make = partial(SGD, lr=0.01, momentum=0.9, nesterov=True)
        optimizer = {"name": "sgd", "function": make, "optimiser": make(model.parameters())}[given]
        torch.manual_seed(3)
        trainer = ReadaptTrainer(model, critical, attack, 0.1)
        settings = {
            "optimizer": optimizer, "learning_rate": 0.01, "epochs": 3, "clip_norm": 1.0
        }  # fmt: skip
        results.append(trainer.fit(stripes(), stripes(seed=4), **settings))
        own = set(model.parameters())
        seen = [value for group in trainer.optimizer.param_groups for value in group["params"]]
        assert own.issuperset(seen) == (given == "optimiser")
        values.append(bits(model))
    for result, value in zip(results[:-1], values[:-1], strict=True):
        assert result.losses == pytest.approx(results[-1].losses, rel=1e-4)
        for key, other in values[-1].items():
            torch.testing.assert_close(value[key], other, rtol=1e-3, atol=1e-4)


def test_what_a_validation_changes_goes_on_training() -> None:
    model, critical = learned()
    seen = []

    def validate(trained: nn.Module) -> float:
        seen.append(trained[7].weight.detach().clone())
        trained[7].weight.data.add_(10)
        return 0.0

    ReadaptTrainer(model, critical, None).fit(stripes(), validate, epochs=2)
    moved = seen[1] - seen[0]
    trains = critical_entries(critical, model)["7.weight"]
    assert (moved[trains] > 5).all()
    assert not moved[~trains].any()


def test_a_checkpoint_of_training_under_masks_is_refused(tmp_path: Path) -> None:
    model, critical = learned()
    file = tmp_path / "training"
    before = bits(model)
    masked = {"optimizer": SGD(model.parameters(), 0.01), "checkpoint": file}
    ReadaptTrainer(model, critical).fit(stripes(), epochs=1, **masked)
    model.load_state_dict(before)
    trainer = ReadaptTrainer(model, critical)
    by_name = {"optimizer": "sgd", "learning_rate": 0.01, "checkpoint": file, "resume": True}
    state = fingerprint(model)
    with pytest.raises(ModelMismatchError, match="another training"):
        trainer.fit(stripes(), epochs=2, **by_name)
    assert_unchanged(model, state)


def eight_samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 6), torch.arange(8) % 3


def adapt(data: Batches) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    freezing = Freezing(layer, {"weight": (torch.arange(6) % 2 == 0).expand(3, 6).clone()})
    ReadaptTrainer(layer, None, None, train=freezing).fit(
        data, epochs=2, optimizer="sgd", learning_rate=0.01
    )
    return layer


def adapt_half(rank: int, folder: str) -> None:
    half = [tuple(values[4 * rank :][:4] for values in eight_samples())]
    torch.save(adapt(half).state_dict(), f"{folder}/{rank}")


def test_processes_average_the_gradients_of_blocks(tmp_path: Path) -> None:
    in_processes(adapt_half, tmp_path)
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in "01")
    wanted = adapt([eight_samples()]).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "zero"),
    [({}, False), ({"clip_norm": 1.0}, True), ({"amp": torch.float16}, True),
     ({"optimizer": "lamb"}, True)],
)  # fmt: skip
def test_gradients_of_frozen_entries_are_zero_where_something_reads_them(
    arguments: dict[str, Any], zero: bool
) -> None:
    model, critical, _, _ = sliced("cnn")
    settings = TrainingSettings(**{"optimizer": "momentum"} | arguments)
    freezing = train_critical(critical, model)
    learner = AdversarialTraining(freezing, settings, AdversarialLoss(model, None, fixed=False))
    assert learner.blocks.zero_gradients == zero


def test_masks_whose_gradients_are_not_zero_end_at_the_same_values() -> None:
    ends = []
    for zero in (True, False):
        model, critical, inputs, labels = sliced("cnn")
        optimizer = OPTIMIZERS["adamw"](model)
        before = bits(model)
        freezing = train_critical(critical, model)
        train(BlockTraining(freezing, optimizer, {}, zero_gradients=zero), inputs, labels, 5)
        trains = entries_with_names(
            model, critical_entries(critical, model), critical_channels(critical, model)
        )
        assert_only_these_moved(model, before, trains)
        ends.append(bits(model))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name])
