"""A removal equals masking for other weights and inputs too, or its groups are left alone."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from networks import TiedLanguage, assert_unchanged, cnn, fingerprint
from nss_prune.core.arguments import fresh
from nss_prune.core.models import clone
from nss_prune.discovery.samples import readable
from nss_prune.discovery.whole import discover
from nss_prune.errors import ArgumentError, NothingToPruneError, RemovalError
from nss_prune.graph.neurons import NeuronMap
from nss_prune.graph.norms import least_neurons
from nss_prune.graph.slices import Slice
from nss_prune.graph.tracing import refuse_reparametrised
from nss_prune.statistics.capture import Watcher
from nss_prune.surgery.random_copy import random_copy, random_inputs
from nss_prune.surgery.removal import remove
from nss_prune.surgery.structure import StructureCheck
from nss_prune.surgery.trial import verified


def halves(neurons: NeuronMap, seed: int = 0) -> Slice:
    """A slice that keeps about 60 % of each group, and the first two neurons."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in neurons.groups:
        kept[group.name] = torch.rand(group.size, generator=generator) < 0.6
        kept[group.name][:2] = True
    return Slice(kept, neurons.groups)


def redrawn(model: nn.Module) -> nn.Module:
    """In float64, with all floating-point tensors drawn from the user's side of the API."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point():
                value.normal_().mul_(0.5)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return model


def assert_removed_equals_masked(
    model: nn.Module, example: Tensor, neurons: NeuronMap, other: Tensor
) -> nn.Module:
    """Planned on the model as it is, carried out on one with other weights, on other inputs."""
    critical = halves(neurons)
    assert critical.removed
    torch.manual_seed(7)
    whole = redrawn(model)
    smaller = copy.deepcopy(whole)
    remove(smaller, critical, example.double())
    with torch.no_grad():
        with critical.masked(whole):
            masked = whole(other)
        removed = smaller(other)
        assert (whole(other) - masked).abs().max() > 1e-3 * masked.abs().max()
    assert (removed - masked).abs().max() < 1e-9 * masked.abs().max()
    return smaller


class Shuffled(nn.Module):
    """Channels in another order, which torch-pruning takes for the same."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, bias=False)
        self.second = nn.Conv2d(16, 12, 1)
        self.third = nn.Linear(12, 5)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, pictures: Tensor) -> Tensor:
        maps = self.first(pictures).relu()
        maps = maps.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return self.scale * self.third(self.second(maps).relu().mean((2, 3)))


@pytest.mark.parametrize("make", [torch.zeros, torch.randn])
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_weights_and_inputs_hide_is_found(
    make: Callable[..., Tensor], scale: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, example = Shuffled(scale).to(dtype), make(1, 3, 8, 8, dtype=dtype)
    before = fingerprint(model)
    state = torch.get_rng_state()
    neurons = verified(model, discover(model, example), example)
    assert torch.equal(state, torch.get_rng_state())
    assert_unchanged(model, before)
    # torch-pruning takes the shuffled channels for those of the same places; labels follow them.
    assert [(group.name, group.size) for group in neurons.groups] == [("first", 4), ("second", 12)]
    assert neurons.groups[0].followed
    assert_removed_equals_masked(
        model.float(), example.float(), neurons, torch.randn(2, 3, 8, 8).double()
    )


@pytest.mark.parametrize("size", [12, 16])
def test_a_norm_written_by_hand_is_left_alone_where_it_is_no_module(size: int) -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.hidden = nn.Linear(6, size), nn.Linear(size, 9)
            self.head = nn.Linear(9, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            stream = self.stem(inputs)
            stream = stream * (stream.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            return self.head(self.hidden(stream).relu())

    model = Inline()
    for example in (torch.zeros(2, 6), torch.randn(2, 6)):
        neurons = verified(model, discover(model, example), example)
        assert [group.name for group in neurons.groups] == ["hidden"]
        assert neurons.left_alone["stem"] == "its channels meet in mean, which is not followed"


def test_what_is_remembered_between_calls_and_random_numbers_stay() -> None:
    class Remembering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.seen: list[int] = []

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(len(inputs))
            noise = torch.randn(len(inputs), 1, dtype=inputs.dtype)
            return self.last((self.first(inputs) + 0.1 * noise).relu())

    torch.manual_seed(0)
    model = Remembering()
    neurons = discover(model, torch.randn(2, 4))
    calls, seen, state = int(model.calls), list(model.seen), torch.get_rng_state()
    StructureCheck(model, torch.randn(2, 4, generator=torch.Generator())).check(halves(neurons))
    assert (int(model.calls), model.seen) == (calls, seen)
    assert torch.equal(state, torch.get_rng_state())


def test_only_the_guilty_group_of_a_slice_is_left_alone() -> None:
    class Rare(nn.Module):
        """Fails with fewer than 6 neurons in one of its layers."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.first(inputs).relu()
            if hidden.shape[-1] == 7:
                raise ValueError("not 7")
            return self.last(self.second(hidden).relu())

    model, inputs = Rare(), torch.randn(2, 4)
    neurons = discover(model, inputs)
    assert len(verified(model, neurons, inputs).groups) == 2
    kept = {name: torch.arange(9) < 7 for name in ("first", "second")}
    critical = Slice(kept, neurons.groups)
    found = verified(model, neurons, inputs, critical=critical)
    assert [group.name for group in found.groups] == ["second"]
    assert "not 7" in found.left_alone["first"]
    with pytest.raises(RemovalError, match="not 7"):
        remove(model, critical, inputs)


def test_random_copies_keep_what_must_stay() -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.two.weight = self.one.weight
            self.scale = nn.Parameter(torch.full((6,), 1e-6))
            self.register_buffer("mask", torch.ones(6, 6).tril())
            self.register_buffer("order", torch.arange(6).flip(0))
            self.register_buffer("bias_of_mask", torch.full((6, 6), -torch.inf).triu(1))

    torch.manual_seed(0)
    model = Everything()
    copied: Any = random_copy(model, torch.float64)
    assert copied.two.weight is copied.one.weight
    assert not torch.equal(copied.one.weight, model.one.weight.double())
    assert (copied.norm.running_var >= 0.5).all()
    assert (copied.norm.running_mean != 0).all()
    assert (copied.scale >= 0.5).all()
    for name in ("mask", "order", "bias_of_mask"):
        assert torch.equal(getattr(copied, name), getattr(model, name))
    assert copied.norm.num_batches_tracked.dtype == torch.long
    assert torch.equal(model.scale, torch.full((6,), 1e-6))


def test_random_weights_of_one_size_share_memory_and_are_not_alike() -> None:
    model = nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(4)))
    weights = [layer.weight for layer in random_copy(model, torch.float64).children()]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) < len(weights)
    for weight in weights:
        for rows in (weight, weight.T):
            assert torch.corrcoef(rows).triu(1).abs().max() < 0.5  # type: ignore[no-untyped-call]
        assert torch.isclose(weight.var(), torch.tensor(2 / 300).double(), rtol=0.05)


def test_random_inputs_keep_ranges_and_masks() -> None:
    tokens, mask = torch.arange(12).view(2, 6), torch.tensor([[1.0, 0], [1, 1]])
    given = {"tokens": tokens, "mask": mask, "zeros": torch.zeros(2, 3), "on": mask.bool()}
    drawn = random_inputs(given)
    assert sorted(drawn["tokens"].flatten().tolist()) == list(range(12))
    assert torch.equal(drawn["mask"], mask)
    assert torch.equal(drawn["on"], mask.bool())
    assert (drawn["zeros"] != 0).all()


def test_a_clone_calls_its_own_parts() -> None:
    def forward(self: Any, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight) + 1

    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LSTM(3, 2))
    model[0].forward = types.MethodType(forward, model[0])  # type: ignore[method-assign]
    model.order = [model[0]]  # type: ignore[assignment]
    copied: Any = clone(model, lambda tensor: tensor.detach() * 0)
    assert copied.order[0] is copied[0]
    assert torch.equal(copied[0](torch.ones(1, 3)), torch.ones(1, 3))
    assert not copied[1](torch.ones(4, 1, 3))[0].any()
    assert model[1](torch.ones(4, 1, 3))[0].any()


def test_each_call_gets_a_cache_of_its_own() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys: list[Tensor] = []

    layer, cache = nn.Linear(2, 2), Cache()
    arguments = (torch.zeros(2), {"cache": cache, "layer": layer, "act": torch.relu})
    first, second = fresh(arguments), fresh(arguments)
    first[1]["cache"].keys.append(torch.ones(1))
    first[0].fill_(1)
    assert not cache.keys
    assert not second[1]["cache"].keys
    assert not arguments[0].any()
    assert first[1]["layer"] is layer
    assert first[1]["act"] is torch.relu


class RootMeanSquare(nn.Module):
    """As language models write it, without torch's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * inputs * (inputs.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Trunk(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 12), norm
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.stem(inputs)
        return self.head(stream + self.down(self.up(self.norm(stream)).relu()))


class Square(nn.Module):
    """A map that is as wide as it has channels."""

    def __init__(self, norm: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, width, 3, padding=1), norm
        self.second, self.head = nn.Conv2d(width, 10, 3), nn.Linear(10, 4)

    def forward(self, pictures: Tensor) -> Tensor:
        maps = self.norm(self.first(pictures)).relu()
        return self.head(self.second(maps).relu().mean((2, 3)))


class OwnTable(nn.Module):
    """A user's own buffer with a value for each channel, and how many there are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("kernel", torch.full((channels, 1, 3, 3), 1 / 9))

    def forward(self, maps: Tensor) -> Tensor:
        return functional.conv2d(maps, self.kernel, padding=1, groups=self.channels)


class OwnConvolution(nn.Conv2d):
    """A convolution with one more parameter for each output."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return self._conv_forward(maps, self.weight * self.gain, self.bias)


MAP, VECTOR = (3, 12, 12), (6,)
STRUCTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "RMSNorm": (lambda: Trunk(nn.RMSNorm(12)), VECTOR, "stem"),
    "a norm of one's own": (lambda: Trunk(RootMeanSquare(12)), VECTOR, "stem"),
    "LayerNorm": (lambda: Trunk(nn.LayerNorm(12)), VECTOR, "stem"),
    "channels first": (lambda: Square(LayerNorm2d(12)), MAP, "first"),
    "GroupNorm": (lambda: Square(nn.GroupNorm(2, 12)), MAP, "first"),
    "frozen norm": (lambda: Square(FrozenBatchNorm2d(12)), MAP, "first"),
    "InstanceNorm": (
        lambda: Square(nn.InstanceNorm2d(12, affine=True, track_running_stats=True)), MAP, "first",
    ),
    "InstanceNorm without weights": (
        lambda: Square(nn.InstanceNorm2d(12, track_running_stats=True)), MAP, "first",
    ),
    "BatchNorm without weights": (
        lambda: Square(nn.BatchNorm2d(12, affine=False)), MAP, "first",
    ),
    "a buffer of one's own": (lambda: Square(OwnTable(12)), MAP, "first"),
    "a parameter of one's own": (
        lambda: Square(OwnConvolution(12, 12, 1)), MAP, "norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES)
def test_removed_equals_masked_with_other_weights(structure: str) -> None:
    make, shape, layer = STRUCTURES[structure]
    torch.manual_seed(0)
    model, example = make().eval(), torch.zeros(1, *shape)
    neurons = verified(model, discover(model, example), example)
    makers = {m.name for g in neurons.groups for m in g.members if m.side == "out"}
    assert layer in makers, neurons.left_alone
    smaller = assert_removed_equals_masked(
        model, example, neurons, torch.randn(3, *shape, dtype=torch.float64)
    )
    assert smaller.get_submodule(layer).weight.shape[0] < 12
    again = discover(smaller, example.double())
    assert {group.name for group in again.groups} == {group.name for group in neurons.groups}


class TiedPair(nn.Module):
    def __init__(self, widths: Sequence[int] = (12, 12, 12)) -> None:
        super().__init__()
        a, b, c = widths
        self.stem, self.one, self.two = nn.Linear(6, a), nn.Linear(a, b), nn.Linear(b, c)
        self.two.weight = self.one.weight
        self.head = nn.Linear(c, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.one(self.stem(inputs).relu()).relu()
        return self.head(self.two(hidden).relu())


def test_layers_that_share_a_weight_lose_the_same_channels() -> None:
    torch.manual_seed(0)
    model, inputs = TiedPair(), torch.randn(2, 6)
    neurons = verified(model, discover(model, inputs), inputs)
    (group,) = neurons.groups
    assert group.size == 12
    smaller = assert_removed_equals_masked(model, inputs, neurons, torch.randn(5, 6).double())
    assert smaller.one.weight is smaller.two.weight
    assert smaller.one.out_features < 12


def test_an_embedding_and_its_head_stay_one_tensor() -> None:
    model, tokens = TiedLanguage(8), torch.arange(10).view(2, 5)
    neurons = verified(model, discover(model, tokens), tokens)
    critical = halves(neurons)
    remove(model, critical, tokens)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.shape == (11, int(critical.kept["hidden"].sum()))


def test_weights_that_would_part_are_left_alone_by_name() -> None:
    class Halfway(nn.Module):
        """The second layer that shares the weight makes the output."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5)
            self.two.weight = self.one.weight
            self.side, self.back = nn.Linear(6, 9), nn.Linear(9, 5)

        def forward(self, inputs: Tensor) -> Tensor:
            side = self.back(self.side(inputs).relu())
            return self.two(self.one(self.stem(inputs).relu()).relu()) + side

    model, inputs = Halfway(), torch.randn(2, 6)
    neurons = verified(model, discover(model, inputs), inputs)
    assert [group.name for group in neurons.groups] == ["side"]
    assert "one tensor" in neurons.left_alone["one"]


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 2}, 32),
        ("resnet18", {}, 64),
        ("mobilenetv3_small_050", {}, 64),
        ("resnetblur18", {}, 64),
    ],
)
def test_widths_of_models_of_timm_follow(name: str, arguments: dict[str, Any], size: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    pictures = torch.randn(2, 3, size, size)
    remove(model, halves(verified(model, discover(model, pictures), pictures)), pictures)
    assert model.forward_head(model.forward_features(pictures), pre_logits=True).shape[1] == (
        model.get_classifier().in_features
    )
    seen: dict[str, int] = {}
    for stage in model.feature_info:
        model.get_submodule(stage["module"]).register_forward_hook(
            lambda _, __, output, stage=stage: seen.update(
                {stage["module"]: output.shape[-1 if output.dim() == 3 else 1]}
            )
        )
    model(pictures)
    assert seen == {stage["module"]: stage["num_chs"] for stage in model.feature_info}
    assert model.forward_features(pictures).shape[1 if "vit" not in name else 2] == (
        model.num_features
    )
    model.reset_classifier(7)
    assert model(pictures).shape == (2, 7)


def test_an_attribute_that_the_outputs_depend_on_stays() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dim = 16
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.first(inputs).relu() * self.dim**-0.5)

    torch.manual_seed(0)
    model, inputs = Scaled(), torch.randn(2, 6)
    neurons = verified(model, discover(model, inputs), inputs)
    smaller = assert_removed_equals_masked(model, inputs, neurons, torch.randn(5, 6).double())
    assert smaller.dim == 16


@pytest.mark.parametrize(
    ("norm", "least"), [(nn.LayerNorm(12), 2), (nn.GroupNorm(2, 12), 2), (nn.Identity(), 1)]
)
def test_a_norm_needs_two_channels(norm: nn.Module, least: int) -> None:
    model = nn.Sequential(nn.Linear(6, 12), norm, nn.Linear(12, 3))
    (group,) = discover(model, torch.randn(2, 6)).groups
    assert least_neurons(group, model) == least


class ByKeyword(nn.Module):
    """Time first, and layers that are called by keyword."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.norm = nn.LayerNorm(12) if norm else None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(input=inputs.transpose(0, 1)).relu()
        if self.norm is not None:
            hidden = self.norm(input=hidden)
        return self.last(input=hidden).mean(0)


@pytest.mark.parametrize("norm", [False, True])
def test_layers_called_by_keyword_are_masked(norm: bool) -> None:
    torch.manual_seed(0)
    model, inputs = ByKeyword(norm), torch.randn(2, 5, 6)
    neurons = verified(model, discover(model, inputs), inputs)
    assert_removed_equals_masked(model, inputs, neurons, torch.randn(4, 5, 6).double())


@pytest.mark.parametrize("samples", [1, 2, 5, 10])
def test_samples_are_found_on_another_axis(samples: int) -> None:
    torch.manual_seed(0)
    model, inputs = ByKeyword(False).double(), torch.randn(samples, 10, 6).double()
    neurons = readable(model, discover(model, inputs), inputs)
    (consumer,) = neurons.groups[0].consumers
    assert consumer.sample_axis == 1
    watcher = Watcher(neurons.groups, samples)
    with watcher.attached(model), torch.no_grad():
        model(inputs)
    (reading,) = watcher.readings
    with torch.no_grad():
        expected = torch.stack([model.first(sample).relu().T for sample in inputs])
    torch.testing.assert_close(reading.activation, expected)


@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm"])
def test_old_reparametrisations_are_refused_with_the_remedy(wrap: str) -> None:
    layer = getattr(nn.utils, wrap)(nn.Linear(3, 4))
    with pytest.raises(ArgumentError, match=f"remove_{wrap}"):
        refuse_reparametrised(nn.Sequential(layer, nn.Linear(4, 2)))


def test_layers_out_of_reach_are_named() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.trunk(inputs)
            return self.head(self.hidden(features).relu())

    found = discover(Frozen(), torch.randn(2, 6))
    assert [group.name for group in found.groups] == ["hidden"]
    assert "no_grad" in found.left_alone["trunk"]
    assert found.left_alone_sizes["trunk"] == 8


def test_a_forward_function_that_calls_another_model_is_refused() -> None:
    model, inputs = cnn().eval(), torch.randn(2, 3, 12, 12).double()
    neurons = discover(model, inputs)
    with pytest.raises(RemovalError, match="forward_fn calls another model"):
        remove(model, halves(neurons), inputs, forward=lambda _, x: model(x))
    with pytest.raises(NothingToPruneError):
        verified(model, neurons, inputs, forward=lambda _, x: model(x))
