"""What is frozen keeps its bits through any optimiser; what should train moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import resnet18

from frozen import assert_only_these_moved, bits, entries_with_names
from networks import Tied, assert_unchanged, cnn, fingerprint, mlp
from nss_prune.adaptation.freezing import (
    Freezing,
    critical_channels,
    critical_entries,
    train_critical,
    train_others,
)
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError
from nss_prune.graph.slices import Slice
from nss_prune.surgery.removal import remove
from nss_prune.surgery.trial import verified


class NormWithActivation(nn.Module):
    """timm's norm, which adds an activation, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 9, 3, padding=1, bias=False)
        self.norm = BatchNormAct2d(9, act_layer=nn.SiLU)
        self.second = nn.Conv2d(9, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.norm(self.first(inputs))).mean((2, 3))


def vit() -> nn.Module:
    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: mlp().float(), (12,), 100),
    "cnn": (lambda: cnn().float(), (3, 12, 12), 100),
    "vit": (vit, (3, 16, 16), 100),
    "tied": (Tied, (3, 6, 6), 20),
    "norm with activation": (NormWithActivation, (3, 6, 6), 100),
    "resnet18": (lambda: resnet18(num_classes=5), (3, 32, 32), 2),
}


def sliced(name: str) -> tuple[nn.Module, Slice, Tensor, Tensor]:
    """A model, a random half of its neurons, and a batch."""
    torch.manual_seed(0)
    build, shape, _ = MODELS[name]
    model = build()
    inputs = torch.randn(6, *shape)
    return model, half_of(model, inputs), inputs, torch.arange(6) % 3


def half_of(model: nn.Module, inputs: Tensor) -> Slice:
    generator = torch.Generator().manual_seed(1)
    neurons = discover(model, inputs)
    if isinstance(model, VisionTransformer):  # attention ties some neurons to its heads
        neurons = verified(model, neurons, inputs)
    groups = neurons.groups
    kept = {}
    for group in groups:
        kept[group.name] = torch.rand(group.size, generator=generator) < 0.5
        kept[group.name][:2] = torch.tensor([True, False])
    return Slice(kept, groups)


def by_groups(model: nn.Module) -> torch.optim.Optimizer:
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": vectors, "weight_decay": 0.0, "lr": 0.05}, {"params": matrices}]
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), 1e-2, weight_decay=0.1),
    "groups": by_groups,
}


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    steps: int,
    *,
    amp: bool = False,
    clip: bool = False,
) -> None:
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = cross_entropy(model(inputs + 0.1 * step).float(), labels)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("optimizer", "amp", "clip"),
    [
        ("sgd", False, False),
        ("adamw", False, False),
        ("sgd", True, False),
        ("groups", False, True),
    ],
)
def test_frozen_entries_keep_their_bits(name: str, optimizer: str, amp: bool, clip: bool) -> None:
    model, critical, inputs, labels = sliced(name)
    if name == "resnet18" and optimizer != "sgd":
        pytest.skip("one optimiser is enough for the large model")
    before = bits(model)
    update = OPTIMIZERS[optimizer](model)
    freezing = train_critical(critical, model)
    with freezing.attach(update):
        train(model, update, inputs, labels, MODELS[name][2], amp=amp, clip=clip)
    trains = entries_with_names(
        model, critical_entries(critical, model), critical_channels(critical, model)
    )
    assert_only_these_moved(model, before, trains)


@pytest.mark.parametrize("name", MODELS)
def test_training_the_others_leaves_the_masked_model_as_it_was(name: str) -> None:
    model, critical, inputs, labels = sliced(name)
    update = OPTIMIZERS["adamw"](model)
    before = bits(model)
    model.eval()
    with critical.masked(model), torch.no_grad():
        outputs = model(inputs)
    with train_others(critical, model).attach(update):
        train(model, update, inputs, labels, 4)
    entries = {name: ~mask for name, mask in critical_entries(critical, model).items()}
    channels = {name: ~mask for name, mask in critical_channels(critical, model).items()}
    after = model.state_dict()
    for key, mask in entries_with_names(model, entries, channels):
        assert torch.equal(before[key][~mask], after[key][~mask]), key
    assert any(bool((before[key] != after[key]).any()) for key in entries)
    model.eval()
    with critical.masked(model), torch.no_grad():
        assert torch.equal(model(inputs), outputs)


def test_outputs_that_are_not_kept_train_on_all_columns() -> None:
    model, critical, inputs, labels = sliced("mlp")
    before, keep = bits(model), torch.tensor([True, False, True])
    update = OPTIMIZERS["sgd"](model)
    with train_others(critical, model, {"5": keep}).attach(update):
        train(model, update, inputs, labels, 10)
    old, new = before["5.weight"], model.state_dict()["5.weight"]
    kept = critical.kept["3"]
    assert torch.equal(old[keep][:, kept], new[keep][:, kept])
    assert (old[~keep] != new[~keep]).all()
    assert torch.equal(before["5.bias"][keep], model[5].bias[keep])
    assert before["5.bias"][1] != model[5].bias[1]


@pytest.mark.parametrize("name", MODELS)
def test_share_is_what_the_removal_leaves(name: str) -> None:
    model, critical, inputs, _ = sliced(name)
    share = train_critical(critical, model).share
    assert share == pytest.approx(1 - critical.compression_rate(model), abs=1e-12)
    entries = critical_entries(critical, model)
    left = {key: value[entries[key]] for key, value in model.named_parameters()}
    remove(model.eval(), critical, inputs)
    for key, value in model.named_parameters():
        assert torch.equal(value.flatten(), left[key]), key


def naive_norm(
    inputs: Tensor, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, frozen: Tensor
) -> Tensor:
    columns = []
    for channel in range(inputs.shape[1]):
        values = inputs[:, channel]
        if frozen[channel]:
            center, spread = mean[channel], variance[channel]
        else:
            center, spread = values.mean(), values.var(correction=0)
        columns.append(
            norm.weight[channel] * (values - center) / (spread + norm.eps).sqrt()
            + norm.bias[channel]
        )
    return torch.stack(columns, 1)


def half_frozen_norm() -> tuple[nn.BatchNorm2d, Tensor, Freezing]:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    frozen = torch.tensor([True, False, True, False, False])
    everything = {key: torch.ones(5, dtype=torch.bool) for key in ("weight", "bias")}
    return norm, frozen, Freezing(norm, everything, {"": frozen})


def test_a_half_frozen_norm_normalises_each_channel_with_its_own_statistics() -> None:
    norm, frozen, freezing = half_frozen_norm()
    inputs = (2 * torch.randn(4, 5, 3, 2, dtype=torch.float64) + 3).requires_grad_()
    toward = torch.randn(4, 5, 3, 2, dtype=torch.float64)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    sources = [inputs, norm.weight, norm.bias]
    wanted = naive_norm(inputs, norm, mean, variance, frozen)
    gradients = torch.autograd.grad((wanted * toward).sum(), sources)
    plain = nn.BatchNorm2d(5).double()
    plain.load_state_dict(norm.state_dict())
    plain(inputs)
    with freezing.attach():
        found = norm(inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        for mine, naive in zip(
            torch.autograd.grad((found * toward).sum(), sources), gradients, strict=True
        ):
            torch.testing.assert_close(mine, naive, rtol=1e-11, atol=1e-12)
    assert torch.equal(norm.running_mean[frozen], mean[frozen])
    assert torch.equal(norm.running_var[frozen], variance[frozen])
    torch.testing.assert_close(norm.running_mean[~frozen], plain.running_mean[~frozen])
    torch.testing.assert_close(norm.running_var[~frozen], plain.running_var[~frozen])


def test_a_wholly_frozen_norm_uses_its_running_statistics_in_training() -> None:
    norm, _, _ = half_frozen_norm()
    weight = {"weight": torch.ones(5, dtype=torch.bool)}
    freezing = Freezing(norm, weight, {"": torch.ones(5, dtype=torch.bool)})
    inputs = torch.randn(4, 5, 3, 2, dtype=torch.float64)
    wanted = norm.eval()(inputs)
    norm.train()
    with freezing.attach():
        norm.train()
        assert torch.equal(norm(inputs), wanted)
        assert norm.training
    assert int(norm.num_batches_tracked) == 0


def test_two_passes_may_share_one_backward_pass() -> None:
    model, critical, inputs, labels = sliced("norm with activation")
    update = OPTIMIZERS["sgd"](model)
    with train_critical(critical, model).attach(update):
        model.train()
        loss = cross_entropy(model(inputs), labels) + cross_entropy(model(-inputs), labels)
        loss.backward()
        update.step()


def test_a_norm_without_statistics_of_a_batch_is_refused() -> None:
    norm, _, freezing = half_frozen_norm()
    with freezing.attach(), pytest.raises(DataError, match="two samples"):
        norm(torch.randn(1, 5, 1, 1, dtype=torch.float64))
    assert not norm._forward_hooks


def test_gradients_of_frozen_entries_are_zero_even_if_they_are_nan() -> None:
    model, critical, inputs, labels = sliced("mlp")
    entries = critical_entries(critical, model)
    with train_critical(critical, model).attach():
        (cross_entropy(model(inputs), labels) * float("nan")).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad[~entries[name]] == 0).all()
            assert parameter.grad[entries[name]].isnan().any()


def test_what_is_wholly_frozen_asks_for_no_gradient_until_the_end() -> None:
    model, _, inputs, labels = sliced("mlp")
    head = {"5.weight": torch.ones(3, 11, dtype=torch.bool)}
    model[1].weight.grad = torch.ones_like(model[1].weight)
    update = OPTIMIZERS["sgd"](model)
    before = bits(model)
    with Freezing(model, head).attach(update):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["5.weight"]
        train(model, update, inputs, labels, 3)
        assert model[1].weight.grad is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert changed == ["5.weight"]


@pytest.mark.parametrize("name", ["mlp", "norm with activation"])
def test_flags_modes_and_hooks_are_restored_after_an_exception(name: str) -> None:
    model, critical, inputs, _ = sliced(name)
    update = OPTIMIZERS["sgd"](model)
    next(model.parameters()).requires_grad_(False)
    model.eval()
    before = fingerprint(model)
    freezing = train_critical(critical, model)
    with pytest.raises(RuntimeError), freezing.attach(update):
        model.train()(inputs[:, :1])
    assert_unchanged(model, before)
    assert not update._optimizer_step_post_hooks
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_without_hooks_of_the_optimiser_restore_is_called_by_hand() -> None:
    model, critical, inputs, labels = sliced("mlp")
    entries, before = critical_entries(critical, model), bits(model)
    freezing = train_critical(critical, model)
    with pytest.raises(ArgumentError, match="inside the context"):
        freezing.restore()
    with freezing.attach():
        train(model, OPTIMIZERS["adamw"](model), inputs, labels, 1)
        freezing.restore()
        for name, value in model.named_parameters():
            assert torch.equal(value[~entries[name]], before[name][~entries[name]])


def test_what_does_not_fit_the_model_is_refused() -> None:
    model, critical, _, _ = sliced("mlp")
    other, _, _, _ = sliced("cnn")
    for model_mask in ({"9.weight": torch.ones(2).bool()}, {"5.bias": torch.ones(2).bool()}):
        with pytest.raises(ModelMismatchError):
            Freezing(model, model_mask)
    with pytest.raises(ModelMismatchError):
        Freezing(model, {"5.bias": torch.ones(3)})
    with pytest.raises(ModelMismatchError):
        Freezing(model, {"5.bias": torch.ones(3).bool()}, {"1": torch.ones(16).bool()})
    with pytest.raises(ModelMismatchError):
        train_critical(critical, other)
    with pytest.raises(ModelMismatchError, match="keep"):
        train_others(critical, model, {"5": torch.ones(4).bool()})
    with pytest.raises(ModelMismatchError):
        train_others(critical, other)


def test_a_slice_of_everything_leaves_nothing_for_the_others() -> None:
    model, critical, _, _ = sliced("mlp")
    kept = {name: torch.ones_like(mask) for name, mask in critical.kept.items()}
    everything = Slice(kept, critical.groups)
    assert train_critical(everything, model).share == 1.0
    with pytest.raises(ArgumentError, match="no entry"):
        train_others(everything, model)


def test_an_optimiser_without_hooks_and_a_second_attachment_are_refused() -> None:
    model, critical, _, _ = sliced("mlp")
    freezing = train_critical(critical, model)
    with pytest.raises(ArgumentError, match="register_step_post_hook"), freezing.attach(object()):
        pass
    with freezing.attach(), pytest.raises(ArgumentError, match="attached"), freezing.attach():
        pass
