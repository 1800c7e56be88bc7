"""Physically removed equals masked, on every architecture; and nothing is ever half removed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import nn

from networks import (
    Residual,
    Tied,
    assert_unchanged,
    batches,
    cnn,
    fingerprint,
    mlp,
    settled,
)
from nss_prune import NSSPruner, Slice, profile, remove
from nss_prune.core.undo import undone_on_error
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, ModelMismatchError, NothingToPruneError, RemovalError
from nss_prune.surgery.execute import LayerNormPruner

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "cnn with flatten": (cnn, (3, 12, 12)),
    "residual, norm, concat": (Residual, (6,)),
    "grouped convolution and norm": (Tied, (3, 8, 8)),
    "torchvision resnet18": (torchvision.models.resnet18, (3, 64, 64)),
    "torchvision vgg11_bn": (torchvision.models.vgg11_bn, (3, 32, 32)),
    "torchvision mobilenet_v2": (torchvision.models.mobilenet_v2, (3, 64, 64)),
    "torchvision densenet121": (torchvision.models.densenet121, (3, 64, 64)),
    "timm resnet18": (lambda: timm.create_model("resnet18"), (3, 64, 64)),
    "timm resnext": (lambda: timm.create_model("resnext26ts"), (3, 64, 64)),
    "timm efficientnet_lite0": (lambda: timm.create_model("efficientnet_lite0"), (3, 64, 64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_removed_equals_masked(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    inputs = torch.randn(8, *shape, dtype=torch.float64)
    model = settled(make().double(), inputs)
    pruner = NSSPruner(model, inputs[:2])
    generator = torch.Generator().manual_seed(1)
    kept = {
        group.name: torch.rand(group.size, generator=generator) < 0.6
        for group in pruner.neurons.groups
    }
    for mask in kept.values():
        mask[0] = True
    critical = Slice(kept, pruner.neurons.groups)
    with torch.no_grad():
        whole = model(inputs)
        with critical.masked(model):
            masked = model(inputs)
    rate = critical.compression_rate(model)
    before = sum(parameter.numel() for parameter in model.parameters())

    remove(model, critical, inputs[:2])

    with torch.no_grad():
        removed = model(inputs)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert masked.abs().max() > 1e-3  # otherwise the comparison would say nothing
    assert (whole - masked).abs().max() > 1e-3
    assert (removed - masked).abs().max() < 1e-9
    assert rate == pytest.approx(1 - after / before, abs=1e-12)
    model.train()
    model(inputs).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_flags_modes_and_hooks_survive() -> None:
    torch.manual_seed(0)
    model = mlp().train()
    model[1].weight.requires_grad_(False)
    calls: list[int] = []
    handle = model[3].register_forward_hook(lambda *_: calls.append(1))
    NSSPruner(model, torch.randn(2, 12).double(), theta=0.8, data=batches(48, (12,), 3)).step()
    assert model.training
    assert not model[1].weight.requires_grad
    assert model[3].weight.requires_grad
    calls.clear()
    model(torch.randn(2, 12).double())
    assert calls
    handle.remove()
    assert not model[3]._forward_hooks


def test_slice_of_another_model_is_refused() -> None:
    torch.manual_seed(0)
    critical = profile(mlp(), batches(48, (12,), 3)).slice(0.8)
    other = cnn()
    before = fingerprint(other)
    with pytest.raises(ModelMismatchError, match=r"no layer|channels"):
        remove(other, critical, torch.randn(2, 3, 12, 12).double())
    assert_unchanged(other, before)


def test_second_removal_of_the_same_slice_is_refused() -> None:
    torch.manual_seed(0)
    model = mlp()
    critical = profile(model, batches(48, (12,), 3)).slice(0.6)
    inputs = torch.randn(2, 12).double()
    remove(model, critical, inputs)
    before = fingerprint(model)
    with pytest.raises(ModelMismatchError, match="profiled"):
        remove(model, critical, inputs)
    assert_unchanged(model, before)


class Stubborn(nn.Module):
    """Does with the number of its neurons what no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(inputs))
        if hidden.shape[-1] != 8:
            raise ValueError("8 neurons or none")
        return self.second(hidden)


class Drifting(Stubborn):
    """Computes something else when it has fewer neurons, without failing."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(inputs))
        return self.second(hidden) * self.first.out_features


@pytest.mark.parametrize(
    ("make", "message"), [(Stubborn, "does not run"), (Drifting, "outputs differ")]
)
def test_a_model_that_would_break_is_put_back(make: type[nn.Module], message: str) -> None:
    torch.manual_seed(0)
    model = make().double().train()
    inputs = torch.randn(40, 6).double()
    data = [(inputs, torch.arange(40) % 3)]
    handle = model.first.register_forward_hook(lambda *_: None)
    critical = profile(model, data).slice(0.7)
    before, outputs = fingerprint(model), model(inputs)
    with pytest.raises(RemovalError, match=message):
        remove(model, critical, inputs[:2])
    with pytest.raises(NothingToPruneError, match=message):
        NSSPruner(model, inputs[:2], theta=0.7, data=data).step()
    assert_unchanged(model, before)
    assert torch.equal(model(inputs), outputs)
    handle.remove()
    assert not model.first._forward_hooks


class Half(nn.Module):
    """A block that can be pruned, between two that cannot."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind(), kind()])
        self.hidden = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 6))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.blocks[1](self.hidden(self.blocks[0](inputs)))


@pytest.mark.parametrize(
    ("kind", "message"), [(Stubborn, "does not run"), (Drifting, "outputs differ")]
)
def test_groups_that_cannot_go_are_left_alone_by_name(kind, message: str) -> None:
    torch.manual_seed(0)
    model = Half(kind).double()
    inputs = torch.randn(40, 6).double()
    before = fingerprint(model)
    pruner = NSSPruner(model, inputs[:2], theta=0.5, data=[(inputs, torch.arange(40) % 3)])
    assert_unchanged(model, before)
    pruner.step()
    rows = {row.layer: row for row in pruner.report.rows}
    for block in ("blocks.0.first", "blocks.1.first"):
        assert rows[block].after == 8
        assert message in rows[block].reason
    assert rows["hidden.0"].after < 16
    assert model(inputs).shape == (40, 3)


def test_interrupt_puts_the_model_back() -> None:
    model = mlp()
    before = fingerprint(model)

    def interrupted() -> None:
        with undone_on_error(model):
            model[1].weight = nn.Parameter(torch.zeros(1, 1))
            model[1].out_features = 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_unchanged(model, before)


def test_a_slice_keeps_at_least_one_neuron() -> None:
    groups = NSSPruner(mlp(), torch.randn(2, 12).double()).neurons.groups
    with pytest.raises(ArgumentError, match="at least one"):
        Slice({"1": torch.zeros(16, dtype=torch.bool)}, groups)
    with pytest.raises(ModelMismatchError, match="bool masks"):
        Slice({"1": torch.ones(5, dtype=torch.bool)}, groups)


def test_layer_norm_keeps_its_weights_in_order() -> None:
    norm = nn.LayerNorm(3000)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(3000.0))
    keep = [2, 1024, 2049, 2999]
    gone = [i for i in range(3000) if i not in keep]
    LayerNormPruner().prune_out_channels(norm, gone)
    assert norm.weight.tolist() == keep
    assert norm.normalized_shape == (4,)


def test_masking_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    model = mlp()
    critical = profile(model, batches(48, (12,), 3)).slice(0.8)
    inputs = torch.randn(4, 12).double()
    expected = model(inputs)
    with pytest.raises(ZeroDivisionError), critical.masked(model):
        raise ZeroDivisionError
    assert torch.equal(model(inputs), expected)
    masked_copy = copy.deepcopy(model)
    with critical.masked(masked_copy):
        assert not torch.equal(masked_copy(inputs), expected)


def test_tied_channels_are_one_neuron_each() -> None:
    torch.manual_seed(0)
    model, inputs = Tied().double(), torch.randn(2, 3, 8, 8).double()
    pruner = NSSPruner(model, inputs, theta=0.9)
    groups = {group.name: group for group in pruner.neurons.groups}
    # 24 channels in the 4 groups of the norm and the 3 of the convolution; 36 in 3 and 2.
    assert (groups["stem"].size, groups["stem"].ties) == (2, 12)
    assert (groups["grouped"].size, groups["grouped"].ties) == (6, 6)
    critical = Slice(
        {"stem": torch.tensor([True, False]), "grouped": torch.arange(6) != 2},
        pruner.neurons.groups,
    )
    remove(model, critical, inputs)
    assert (model.stem.out_channels, model.norm.num_channels) == (12, 12)
    assert (model.grouped.in_channels, model.grouped.out_channels) == (12, 30)
    assert (model.norm.num_groups, model.grouped.groups, model.inner.num_groups) == (4, 3, 2)


class Positions(nn.Module):
    """Adds a learned function of the positions, which is the same for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 6))
        self.hidden = nn.Linear(6, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        positions = torch.ones(4, 2, dtype=inputs.dtype)
        return self.head(torch.relu(self.hidden(inputs + self.table(positions).mean(0))))


@pytest.mark.filterwarnings("ignore:no data was given")
def test_nothing_reads_samples() -> None:
    model = Positions().double()
    before = fingerprint(model)
    pruner = NSSPruner(model, torch.randn(2, 6).double(), ignored_layers=["hidden"])
    with pytest.raises(NothingToPruneError, match="reads no samples"):
        pruner.step()
    assert_unchanged(model, before)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_what_reads_no_samples_is_left_alone(samples: int) -> None:
    torch.manual_seed(0)
    model, inputs = Positions().double(), torch.randn(40, 6).double()
    data = [(inputs, torch.arange(40) % 3)]
    pruner = NSSPruner(model, inputs[:samples], params_budget=0.6, data=data)
    pruner.step()
    assert pruner.neurons.left_alone["table.0"] == "table.2 reads no samples"
    assert model.table[0].out_features == 9
    assert model.hidden.out_features < 16


def test_the_check_is_in_full_precision_and_settings_come_back() -> None:
    seen = []

    class Watching(nn.Sequential):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().forward(inputs)

    model = Watching(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    inputs = torch.randn(5, 4)
    critical = profile(model, [(inputs, torch.arange(5) % 2)], progress=False).slice(ratio=0.5)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    try:
        seen.clear()
        remove(model, critical, inputs)
        after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
    assert len(seen) >= 2
    assert set(seen) == {("highest", False)}
    assert after == ("high", before[1])


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 6, 6, 6)])
def test_channels_last_stays(shape: tuple[int, ...]) -> None:
    convolution = nn.Conv2d if len(shape) == 3 else nn.Conv3d
    pool = nn.AdaptiveAvgPool2d(1) if len(shape) == 3 else nn.AdaptiveAvgPool3d(1)
    layers = [convolution(3, 8, 3), nn.ReLU(), convolution(8, 6, 3), pool, nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(6, 2))
    memory = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    model.to(memory_format=memory)
    inputs = torch.randn(2, *shape)
    neurons = discover(model, inputs)
    kept = {group.name: torch.arange(group.size) % 2 == 0 for group in neurons.groups}
    remove(model, Slice(kept, neurons.groups), inputs)
    for layer, width in ((model[0], 4), (model[2], 3)):
        assert layer.weight.shape[0] == width
        assert layer.weight.is_contiguous(memory_format=memory)
