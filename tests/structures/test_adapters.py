"""A head is a neuron: heads removed equal heads masked, whatever the attention looks like."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import GatedMlp, GluMlp, Mlp, SwiGLU
from timm.models import mvitv2
from torch import Tensor, nn

from networks import assert_unchanged, fingerprint
from nss_prune.core.models import evaluation
from nss_prune.core.undo import undone_on_error
from nss_prune.discovery.calls import recording
from nss_prune.discovery.claims import adapted, claims, joined
from nss_prune.discovery.trial import adapted_on_trial
from nss_prune.discovery.whole import discover
from nss_prune.errors import GraphError, RemovalError
from nss_prune.graph.neurons import Member, NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.profiling.run import profile_neurons
from nss_prune.pruner.checkpoint import load_pruned, save_pruned
from nss_prune.structures.attention import Attention
from nss_prune.structures.gated import GatedUnit
from nss_prune.structures.known import ADAPTERS
from nss_prune.structures.protocol import Adapter, Change
from nss_prune.surgery.execute import execute
from nss_prune.surgery.metadata import apply_changes, planned_changes
from nss_prune.surgery.plan import plan_removal

WIDTH = 12
NOTHING = NeuronMap(())


def heads_of(projected: Tensor, heads: int) -> Tensor:
    """``[samples, tokens, heads * width]`` -> ``[samples, heads, tokens, width]``."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    attention = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + bias).softmax(-1)
    return (attention @ value).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    """Queries, keys and values from one layer, part by part or head by head."""

    def __init__(self, heads: int = 4, head_by_head: bool = False, **_: Any) -> None:
        super().__init__()
        self.n_heads = heads
        self.head_by_head = head_by_head
        self.qkv = nn.Linear(WIDTH, 3 * heads * 3)
        self.proj = nn.Linear(3 * heads, WIDTH)

    def parts(self, inputs: Tensor) -> Sequence[Tensor]:
        fused = self.qkv(inputs)
        if self.head_by_head:
            return heads_of(fused, self.n_heads).chunk(3, -1)
        return [heads_of(part, self.n_heads) for part in fused.chunk(3, -1)]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.proj(attend(*self.parts(inputs)))


class Softmaxed(Fused):
    """Heads that compete: each depends on all."""

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = self.parts(inputs)
        return self.proj(attend(query.softmax(1), key, value))


class Chained(Fused):
    """Every second head goes on from the one two before it."""

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = self.parts(inputs)
        value = torch.cat([value[:, :2], value[:, 2:] + value[:, :-2]], 1)
        return self.proj(attend(query, key, value))


class ConvNorm(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


class Separate(nn.Module):
    """1 x 1 convolutions with norms, and an activation before the one that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.to_q = ConvNorm(WIDTH, 6)
        self.to_k = ConvNorm(WIDTH, 6)
        self.to_v = ConvNorm(WIDTH, 15)
        self.to_out = nn.Sequential(nn.GELU(), nn.Conv2d(15, WIDTH, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        layers = (self.to_q, self.to_k, self.to_v)
        parts = [heads_of(layer(inputs).flatten(2).mT, self.heads) for layer in layers]
        return self.to_out(attend(*parts).mT.unflatten(-1, inputs.shape[2:]))


class BiasedApart(Fused):
    """Biases and tables as in BEiT, a scale and a small network as in Swin V2."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__(heads)
        self.num_heads = heads
        self.all_head_dim = 3 * heads
        self.qkv.register_parameter("bias", None)
        self.q_bias = nn.Parameter(torch.randn(3 * heads))
        self.register_buffer("k_bias", torch.randn(3 * heads), persistent=False)
        self.v_bias = nn.Parameter(torch.randn(3 * heads))
        self.logit_scale = nn.Parameter(torch.rand(heads, 1, 1))
        self.register_buffer("slopes", torch.randn(heads, 1, 1))
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, heads))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, heads, bias=False))

    def parts(self, inputs: Tensor) -> Sequence[Tensor]:
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        fused = nn.functional.linear(inputs, self.qkv.weight, bias)
        return [heads_of(part, self.num_heads) for part in fused.chunk(3, -1)]

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = inputs.shape[1]
        bias = self.relative_position_bias_table[:tokens].mT[:, None] * self.slopes
        bias = bias + self.cpb_mlp(inputs[0, :, :2]).mT[:, None]
        query, key, value = self.parts(inputs)
        mixed = attend(query * self.logit_scale, key, value, bias)
        return self.proj(mixed.reshape(*inputs.shape[:2], self.all_head_dim))


class KeysByWidth(nn.Module):
    """As in Hugging Face's models: no number of heads, but their width, and fewer key heads."""

    def __init__(self, key_heads: int = 2) -> None:
        super().__init__()
        self.head_dim = 5
        self.num_key_value_groups = 6 // key_heads
        self.q_proj = nn.Linear(WIDTH, 30)
        self.k_proj = nn.Linear(WIDTH, 5 * key_heads)
        self.v_proj = nn.Linear(WIDTH, 5 * key_heads)
        self.o_proj = nn.Linear(30, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (
            layer(inputs).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in layers
        )
        key, value = (part.repeat_interleave(self.num_key_value_groups, 1) for part in (key, value))
        return self.o_proj(attend(query, key, value))


def of_timm(path: str, *arguments: Any, **keywords: Any) -> Callable[[], nn.Module]:
    """What makes a module of timm; the test is skipped where timm has none that takes this."""

    def make(**more: Any) -> nn.Module:
        module, _, name = path.rpartition(".")
        try:
            found: nn.Module = getattr(importlib.import_module(f"timm.{module}"), name)(
                *arguments, **keywords, **more
            )
        except (ImportError, AttributeError, TypeError) as error:
            pytest.skip(f"timm {timm.__version__}: {error}")
        return found

    return make


def of_model(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    """What makes a model of timm; the test is skipped where timm does not have it."""

    def make() -> nn.Module:
        if not timm.is_model(name):
            pytest.skip(f"timm {timm.__version__} has no {name}")
        model: nn.Module = timm.create_model(name, num_classes=3, **arguments)
        return model

    return make


def skip_where_timm_ties(name: str) -> None:
    """Skip a test of vision transformers where timm's tie their heads to the width of the input."""
    if name.split(",")[0] in ("ViT", "DeiT", "MobileViT"):
        make = of_timm("models.vision_transformer.Attention", WIDTH, 4)
        if not hasattr(make(), "attn_dim"):
            pytest.skip(f"heads are tied to the width of the input in timm {timm.__version__}")


Made = tuple[Callable[[], nn.Module], tuple[int, ...]]
"""What makes a module, and the shape of what it takes."""


class OnMap(nn.Module):
    """Attention that is told the size of its map."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.inner = of_timm(path, WIDTH, 4)()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs, (2, 3))


TOKENS = (6, WIDTH)
MAP = (WIDTH, 4, 4)
WIDE_VALUES = {"num_heads": 4, "key_dim": 3, "attn_ratio": 2}

# Attention whose heads can go.
STRUCTURES: dict[str, Made] = {
    "fused": (Fused, TOKENS),
    "fused, head by head without saying so": (partial(Fused, head_by_head=True), TOKENS),
    "convolutions with norms": (Separate, MAP),
    "biases, tables and buffers": (BiasedApart, TOKENS),
    "as many heads as channels in a head": (partial(BiasedApart, 3), TOKENS),
    "shared keys": (KeysByWidth, TOKENS),
    "a single key": (partial(KeysByWidth, 1), TOKENS),
    "ViT": (of_timm("models.vision_transformer.Attention", WIDTH, 4, qkv_bias=True), TOKENS),
    "ViT, norms of query and key": (
        of_timm(
            "models.vision_transformer.Attention", WIDTH, 4, qk_norm=True, norm_layer=nn.LayerNorm
        ),
        TOKENS,
    ),
    "ViT, wide heads, a norm and a gate": (
        of_timm(
            "layers.Attention", 10, 2, attn_head_dim=3, scale_norm=True, gated=True,
            norm_layer=nn.LayerNorm,
        ),
        (6, 10),
    ),
    "rotary, apart": (of_timm("layers.AttentionRope", WIDTH, 3, qkv_fused=False), TOKENS),
    "rotary, shared keys": (
        of_timm("layers.AttentionRope", WIDTH, 6, qkv_fused=False, num_kv_heads=3), TOKENS,
    ),
    "Swin": (
        of_timm("models.swin_transformer.WindowAttention", WIDTH, 4, window_size=(2, 3)), TOKENS,
    ),
    "Hiera": (
        of_timm(
            "models.hiera.MaskUnitAttention", WIDTH, 20, heads=4, q_stride=2, window_size=3
        ),
        TOKENS,
    ),
    "SAM": (
        of_timm(
            "models.vision_transformer_sam.Attention", WIDTH, 4, use_rel_pos=True,
            input_size=(4, 5),
        ),
        (4, 5, WIDTH),
    ),
    "TNT": (of_timm("models.tnt.Attention", WIDTH, 8, 4), TOKENS),
    "VOLO, class token": (of_timm("models.volo.ClassAttention", WIDTH, 4), TOKENS),
    "Visformer": (of_timm("models.visformer.Attention", WIDTH, 4, head_dim_ratio=1.0), MAP),
    "LeViT": (
        of_timm("models.levit.Attention", WIDTH, resolution=(2, 3), **WIDE_VALUES), TOKENS,
    ),
    "LeViT, convolutions": (
        of_timm("models.levit.Attention", WIDTH, resolution=(4, 4), use_conv=True, **WIDE_VALUES),
        MAP,
    ),
    "LeViT, downsampling": (
        of_timm("models.levit.AttentionDownsample", WIDTH, 9, resolution=(4, 4), **WIDE_VALUES),
        (16, WIDTH),
    ),
    "EfficientFormer": (
        of_timm("models.efficientformer.Attention", WIDTH, resolution=(2, 3), **WIDE_VALUES),
        TOKENS,
    ),
    "TinyViT": (
        of_timm("models.tiny_vit.Attention", WIDTH, resolution=(2, 3), **WIDE_VALUES), TOKENS,
    ),
    "MaxViT, table": (
        of_timm(
            "models.maxxvit.AttentionCl", WIDTH, dim_head=4,
            rel_pos_cls=of_timm("layers.RelPosBias", (2, 3)),
        ),
        TOKENS,
    ),
    "2D": (of_timm("layers.Attention2d", WIDTH, num_heads=4), MAP),
    "2D, head by head": (of_timm("layers.Attention2d", WIDTH, num_heads=4, head_first=True), MAP),
    "multi-query": (of_timm("layers.MultiQueryAttention2d", WIDTH, num_heads=4, kv_stride=2), MAP),
}  # fmt: skip

# Attention that takes the width of all heads from its input: no head can go.
TIED: dict[str, Made] = {
    "BEiT": (of_timm("models.beit.Attention", WIDTH, 4, qkv_bias=True), TOKENS),
    "EVA": (of_timm("models.eva.EvaAttention", WIDTH, 4, scale_norm=False), TOKENS),
    "Swin V2": (
        of_timm("models.swin_transformer_v2.WindowAttention", WIDTH, (2, 3), 4), TOKENS,
    ),
    "XCiT": (of_timm("models.xcit.XCA", WIDTH, 4), TOKENS),
    "CaiT, class token": (of_timm("models.cait.ClassAttn", WIDTH, 4), TOKENS),
    "PVT": (partial(OnMap, "models.pvt_v2.Attention"), TOKENS),
    "Twins": (partial(OnMap, "models.twins.GlobalSubSampleAttn"), TOKENS),
}  # fmt: skip

# Not attention, or heads that a layer mixes, or a forward function of torch's.
NOT_CLAIMED: dict[str, Callable[[], nn.Module]] = {
    "talking heads": of_timm("models.cait.TalkingHeadAttn", WIDTH, 4),
    "talking heads, convolutions": of_timm("models.efficientformer_v2.Attention2d", WIDTH, 4, 4, 2),
    "outlook attention": of_timm("models.volo.OutlookAttention", WIDTH, 4),
    "a single head": partial(Fused, 1),
    "torch's own, with a key of no token": partial(
        nn.MultiheadAttention, WIDTH, 4, add_bias_kv=True
    ),
    "torch's own, with a zero of no token": partial(
        nn.MultiheadAttention, WIDTH, 4, add_zero_attn=True
    ),
    "a multilayer perceptron": of_timm("layers.Mlp", WIDTH),
}

SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "DeiT": (
        of_model("deit_tiny_patch16_224", depth=2, embed_dim=24, img_size=32), 32,
    ),
    "ViT": (of_model("test_vit"), 160),
    "Swin": (
        of_model(
            "swin_tiny_patch4_window7_224", embed_dim=12, depths=(2, 2),
            num_heads=(2, 4), img_size=56,
        ),
        56,
    ),
    "MaxViT": (of_model("test_maxvit"), 160),
    "CoAtNet": (of_model("test_coatnet"), 160),
    "MobileViT": (of_model("mobilevit_xxs"), 64),
    "LeViT": (
        of_model(
            "levit_128s", embed_dim=(16, 24, 32), num_heads=(2, 3, 4),
            key_dim=4, depth=(1, 1, 1),
        ),
        224,
    ),
    "MViT": (
        of_timm(
            "models.mvitv2.MultiScaleVit",
            mvitv2.MultiScaleVitCfg(depths=(1, 1), embed_dim=(8, 16), num_heads=(2, 4)),
            img_size=64,
        ),
        64,
    ),
    "Hiera": (
        of_model(
            "hiera_tiny_224", embed_dim=16, num_heads=2, stages=(1, 1, 1, 1)
        ),
        224,
    ),
}  # fmt: skip


def lively(module: nn.Module) -> nn.Module:
    """In float64, with all parameters and buffers random, so that heads make a difference."""
    module = module.double().eval()
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point():
                value.normal_().mul_(0.5)
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    for part in module.modules():
        for name in [name for name in vars(part) if name.endswith("_cache")]:
            vars(part)[name] = {}
    return module


def random_slice(neurons: NeuronMap, seed: int = 0) -> Slice:
    """About half of the neurons of each group, at least one, and not all."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in neurons.groups:
        order = torch.randperm(group.size, generator=generator)
        kept[group.name] = torch.zeros(group.size, dtype=torch.bool)
        kept[group.name][order[: (group.size + 1) // 2]] = True
    return Slice(kept, neurons.groups)


def cut(model: nn.Module, critical: Slice, adapters: Sequence[Adapter] = ADAPTERS) -> None:
    changes = planned_changes(model, critical, adapters)
    with undone_on_error(model):
        execute(model, plan_removal(critical, model), {})
        apply_changes(changes)


@torch.no_grad()
def check_removed_equals_masked(model: nn.Module, neurons: NeuronMap, inputs: Tensor) -> None:
    critical = random_slice(neurons)
    whole = model(inputs)
    with critical.masked(model):
        masked = model(inputs)
    rate = critical.compression_rate(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    cut(model, critical)
    removed = model(inputs)
    after = sum(parameter.numel() for parameter in model.parameters())
    assert (whole - masked).abs().max() > 1e-3 * whole.abs().max()
    assert (removed - masked).abs().max() < 1e-9 * whole.abs().max()
    assert rate == pytest.approx(1 - after / before, abs=1e-12)


def made(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return lively(nn.Sequential(make())), torch.randn(3, *shape, dtype=torch.float64)


def on_trial(
    model: nn.Module,
    neurons: NeuronMap,
    inputs: torch.Tensor,
    adapters: Sequence[Adapter] = ADAPTERS,
    ignored: Sequence[nn.Module] = (),
) -> NeuronMap:
    """What discovery does with the claims."""
    claimed = list(claims(model, adapters, ignored))
    with recording({module for module, _, _ in claimed}) as calls, evaluation(model):
        model(inputs)
    return adapted_on_trial(model, neurons, claimed, calls)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_heads_removed_equal_heads_masked(structure: str, fused: bool) -> None:
    skip_where_timm_ties(structure)
    model, inputs = made(*STRUCTURES[structure])
    if hasattr(model[0], "fused_attn"):
        model[0].fused_attn = fused
    before = fingerprint(model)
    neurons = on_trial(model, NOTHING, inputs)
    assert_unchanged(model, before)
    assert len(neurons.groups) == 1, neurons.left_alone
    check_removed_equals_masked(model, neurons, inputs)
    model.train()(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_heads_of_models_of_timm(name: str) -> None:
    skip_where_timm_ties(name)
    make, size = SMALL[name]
    torch.manual_seed(0)
    model = lively(make())
    inputs = torch.randn(2, 3, size, size, dtype=torch.float64)
    neurons = on_trial(model, NOTHING, inputs)
    assert len(neurons.groups) > 1
    assert not neurons.left_alone
    order = [name for name, _ in model.named_modules()]
    assert [group.name for group in neurons.groups] == sorted(
        [group.name for group in neurons.groups], key=order.index
    )
    check_removed_equals_masked(model, neurons, inputs)
    model.train()(inputs).square().sum().backward()


@pytest.mark.parametrize("structure", TIED)
def test_heads_tied_to_the_width_of_the_input_are_left_alone(structure: str) -> None:
    model, inputs = made(*TIED[structure])
    before = fingerprint(model)
    (claimed,) = adapted(model, NOTHING).groups
    neurons = on_trial(model, NOTHING, inputs)
    assert_unchanged(model, before)
    assert not neurons.groups
    assert "does not run" in neurons.left_alone[claimed.name]
    assert neurons.left_alone_sizes[claimed.name] == claimed.members[0].width


@pytest.mark.parametrize("name", NOT_CLAIMED)
def test_not_claimed(name: str) -> None:
    model = nn.Sequential(NOT_CLAIMED[name]())
    assert not list(claims(model))


@pytest.mark.parametrize("make", [Softmaxed, Chained])
def test_heads_that_depend_on_each_other_are_left_alone(make: type[nn.Module]) -> None:
    model, inputs = made(make, TOKENS)
    nn.init.zeros_(model[0].proj.weight)  # so that outputs say nothing
    neurons = on_trial(model, NOTHING, inputs)
    assert not neurons.groups
    assert "depend on each other" in neurons.left_alone["0.qkv"]


def test_the_order_of_channels_is_found_where_outputs_say_nothing() -> None:
    model, inputs = made(partial(Fused, head_by_head=True), TOKENS)
    nn.init.zeros_(model[0].proj.weight)
    (group,) = on_trial(model, NOTHING, inputs).groups
    nn.init.normal_(model[0].proj.weight)
    check_removed_equals_masked(model, NeuronMap((group,)), inputs)


def test_members_of_fused_attention_by_hand() -> None:
    model = nn.Sequential(Fused(2))
    (group,) = adapted(model, NOTHING).groups
    qkv, proj = group.members
    assert (group.name, group.size, group.ties) == ("0.qkv", 2, 1)
    assert (qkv.name, qkv.side, qkv.width, qkv.axis) == ("0.qkv", "out", 18, None)
    assert qkv.channels.tolist() == [0, 1, 2, 6, 7, 8, 12, 13, 14, *range(3, 6), *range(9, 12),
                                     *range(15, 18)]  # fmt: skip
    assert qkv.neurons.tolist() == [0] * 9 + [1] * 9
    assert (proj.name, proj.side, proj.width) == ("0.proj", "in", 6)
    assert proj.channels.tolist() == list(range(6))
    assert proj.neurons.tolist() == [0, 0, 0, 1, 1, 1]
    assert group.consumers == (proj,)


def test_shared_keys_go_with_all_of_their_queries() -> None:
    model, _ = made(KeysByWidth, TOKENS)
    (group,) = adapted(model, NOTHING).groups
    sizes = {member.name: torch.bincount(member.neurons).tolist() for member in group.members}
    assert sizes == {
        "0.q_proj": [15, 15], "0.k_proj": [5, 5], "0.v_proj": [5, 5], "0.o_proj": [15, 15]
    }  # fmt: skip
    cut(model, Slice({group.name: torch.tensor([False, True])}, (group,)))
    assert (model[0].head_dim, model[0].num_key_value_groups) == (5, 3)
    assert model[0].k_proj.out_features == 5


def test_a_single_key_stays_for_the_queries_left() -> None:
    model, _ = made(partial(KeysByWidth, 1), TOKENS)
    (group,) = adapted(model, NOTHING).groups
    assert group.size == 6
    cut(model, Slice({group.name: torch.arange(6) < 2}, (group,)))
    assert (model[0].head_dim, model[0].num_key_value_groups) == (5, 2)
    assert (model[0].q_proj.out_features, model[0].k_proj.out_features) == (10, 5)


def test_attributes_follow_the_heads_and_the_scale_stays() -> None:
    model, _ = made(*STRUCTURES["ViT"])
    attention = model[0]
    scale = attention.scale
    neurons = adapted(model, NOTHING)
    cut(model, Slice({neurons.groups[0].name: torch.arange(4) < 3}, neurons.groups))
    assert attention.num_heads == 3
    assert attention.head_dim == 3
    assert getattr(attention, "attn_dim", 9) == 9
    assert attention.scale == scale


def test_heads_go_in_several_steps_down_to_one() -> None:
    model, inputs = made(BiasedApart, TOKENS)
    for left in (2, 1):
        neurons = on_trial(model, NOTHING, inputs)
        check_removed_equals_masked(model, neurons, inputs)
        assert model[0].num_heads == left
    assert not adapted(model, NOTHING).groups


def test_attributes_are_put_back_when_a_removal_fails() -> None:
    model, inputs = made(BiasedApart, TOKENS)
    expected, before = model(inputs), fingerprint(model)
    neurons = adapted(model, NOTHING)

    def fail_after_cutting() -> None:
        with undone_on_error(model):
            cut(model, random_slice(neurons))
            assert model[0].num_heads == 2
            raise RuntimeError("on purpose")

    with pytest.raises(RemovalError, match="on purpose"):
        fail_after_cutting()
    assert_unchanged(model, before)
    assert model[0].num_heads == 4
    assert torch.equal(model(inputs), expected)


def test_nothing_changes_where_no_head_goes() -> None:
    model, _ = made(Fused, TOKENS)
    neurons = adapted(model, NOTHING)
    whole = Slice({"0.qkv": torch.ones(4, dtype=torch.bool)}, neurons.groups)
    assert planned_changes(model, whole) == ()
    assert planned_changes(model, Slice({}, ())) == ()


class Classifier(nn.Module):
    """Attention, then neurons that torch-pruning finds."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.hidden = nn.Linear(WIDTH, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        attended = self.attention(inputs)
        return self.head(torch.relu(self.hidden(attended)).mean(1))


def classifier(attention: nn.Module | None = None) -> tuple[Classifier, Tensor]:
    torch.manual_seed(0)
    return lively(Classifier(attention or Fused())), torch.randn(9, *TOKENS).double()


def test_the_map_of_the_graph_gets_the_heads() -> None:
    model, inputs = classifier()
    found = discover(model, inputs)
    neurons = on_trial(model, found, inputs)
    sizes = {group.name: group.size for group in neurons.groups}
    assert sizes == {"attention.qkv": 4, "attention.proj": 12, "hidden": 8}
    assert "attention.qkv" not in neurons.left_alone
    assert neurons.left_alone.keys() == neurons.left_alone_sizes.keys()
    check_removed_equals_masked(model, neurons, inputs)


def test_groups_that_share_a_side_are_replaced() -> None:
    model, _ = classifier()
    (heads,) = adapted(model, NOTHING).groups
    everything = torch.arange(12)
    consumer = Member("attention.proj", "in", everything, everything, 12)
    other = Member("head", "in", torch.arange(8), torch.arange(8), 8)
    old = NeuronMap(
        (NeuronGroup("hidden", 12, (consumer,)), NeuronGroup("head", 8, (other,))),
        {"attention.qkv": "tied"},
        {"attention.qkv": 36},
        ("a note",),
    )
    result = joined(model, old, [heads])
    assert [group.name for group in result.groups] == ["attention.qkv", "head"]
    assert result.left_alone == {"hidden": "shares channels with the neurons of attention.qkv"}
    assert result.left_alone_sizes == {"hidden": 12}
    assert result.notes == ("a note",)


def test_groups_stay_where_heads_are_refused() -> None:
    model, inputs = classifier(TIED["EVA"][0]())
    found = discover(model, inputs)
    neurons = on_trial(model, found, inputs)
    assert neurons.groups == found.groups


@pytest.mark.parametrize(
    "ignored", [lambda model: model.attention, lambda model: model.attention.qkv]
)
def test_ignored_attention_is_not_claimed(ignored: Callable[[Any], nn.Module]) -> None:
    model, inputs = classifier()
    assert not adapted(model, NOTHING, ignored=[ignored(model)]).groups
    assert not on_trial(model, NOTHING, inputs, ignored=[ignored(model)]).groups


def test_ignored_parameters_are_not_claimed() -> None:
    model, _ = classifier(BiasedApart())
    assert not adapted(model, NOTHING, ignored=[model.attention.logit_scale]).groups


def test_a_table_that_others_use_as_well_is_not_claimed() -> None:
    model = nn.Sequential(BiasedApart(), BiasedApart())
    assert len(adapted(model, NOTHING).groups) == 2
    model[1].relative_position_bias_table = model[0].relative_position_bias_table
    assert not adapted(model, NOTHING).groups
    apart = nn.Sequential(BiasedApart(), BiasedApart())
    apart[1].cpb_mlp = apart[0].cpb_mlp
    assert not adapted(apart, NOTHING).groups


def test_attention_used_twice_is_claimed_once() -> None:
    torch.manual_seed(0)
    attention = Fused()
    model, inputs = lively(nn.Sequential(attention, attention)), torch.randn(3, *TOKENS).double()
    neurons = on_trial(model, NOTHING, inputs)
    assert [group.name for group in neurons.groups] == ["0.qkv"]
    check_removed_equals_masked(model, neurons, inputs)


class Rare(nn.Module):
    """Attention under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = 3
        self.make = nn.Linear(WIDTH, 6)
        self.join = nn.Linear(6, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        made = heads_of(self.make(inputs), self.pieces)
        return self.join(attend(made, made, made))


class RareAdapter:
    def groups(self, name: str, module: nn.Module) -> tuple[NeuronGroup, ...]:
        if not hasattr(module, "pieces"):
            return ()
        prefix = f"{name}." if name else ""
        channels = torch.arange(module.make.out_features)
        neurons = channels // 2
        members = (
            Member(f"{prefix}make", "out", channels, neurons, len(channels)),
            Member(f"{prefix}join", "in", channels, neurons, len(channels)),
        )
        return (NeuronGroup(f"{prefix}make", len(channels) // 2, members),)

    def changes(self, module: nn.Module, group: NeuronGroup, kept: Tensor) -> Iterator[Change]:
        yield Change(module, "pieces", int(kept.sum()))


def test_an_adapter_of_ones_own() -> None:
    model, inputs = classifier(Rare())
    adapters = (RareAdapter(), *ADAPTERS)
    assert not adapted(model, NOTHING).groups
    neurons = on_trial(model, NOTHING, inputs, adapters)
    assert [group.name for group in neurons.groups] == ["attention.make"]
    cut(model, random_slice(neurons), adapters)
    assert model.attention.pieces == 2
    assert model(inputs).shape == (9, 3)


def test_the_first_of_two_adapters_that_claim_the_same_has_it() -> None:
    model, inputs = classifier()
    neurons = on_trial(model, NOTHING, inputs, (Attention(), Attention()))
    assert len(neurons.groups) == 1
    (group,) = neurons.groups
    outer = replace(group, name="hidden")
    assert joined(model, NOTHING, [group, outer]).groups == (group,)


def test_a_model_that_does_not_run_is_refused_in_words() -> None:
    model, _ = classifier()
    before = fingerprint(model)
    with pytest.raises(GraphError, match="does not run on the example inputs"):
        discover(model, torch.randn(2, 3))
    assert_unchanged(model, before)


def test_attention_that_is_not_called_is_left_alone() -> None:
    model, inputs = classifier()
    model.spare = Fused().double()
    neurons = on_trial(model, NOTHING, inputs)
    assert [group.name for group in neurons.groups] == ["attention.qkv"]
    assert "not called" in neurons.left_alone["spare.qkv"]


def test_heads_are_profiled_and_sliced_as_neurons() -> None:
    model, inputs = classifier()
    neurons = on_trial(model, discover(model, inputs), inputs)
    data = [(inputs, torch.arange(9) % 3)]
    profile = profile_neurons(model, data, neurons, minimum_samples=2)
    assert profile.layers == {"attention.qkv": 4, "attention.proj": 12, "hidden": 8}
    critical = profile.slice(ratio=0.5)
    loaded = copy.deepcopy(model)
    cut(loaded, critical)
    with torch.no_grad(), critical.masked(model):
        torch.testing.assert_close(loaded(inputs), model(inputs))


def test_slices_of_heads_survive_a_file(tmp_path: Path) -> None:
    model, inputs = classifier()
    critical = random_slice(on_trial(model, NOTHING, inputs))
    critical.save(tmp_path / "slice.safetensors")
    cut(model, Slice.load(tmp_path / "slice.safetensors"))
    assert model.attention.n_heads == 2
    assert model(inputs).shape == (9, 3)


@pytest.mark.parametrize("fused", [True, False])
def test_vision_transformer_after_the_removal(fused: bool, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        model = SMALL["DeiT"][0]().eval()
        for block in model.blocks:
            block.attn.fused_attn = fused
        return model

    skip_where_timm_ties("DeiT")
    torch.manual_seed(0)
    model, inputs = fresh(), torch.randn(2, 3, 32, 32)
    cut(model, random_slice(on_trial(model, NOTHING, inputs)))
    expected = model(inputs)
    torch.testing.assert_close(torch.export.export(model, (inputs,)).module()(inputs), expected)
    assert torch.equal(copy.deepcopy(model)(inputs), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(inputs), expected)
    save_pruned(model, tmp_path / "model.safetensors")
    assert torch.equal(load_pruned(tmp_path / "model.safetensors", fresh())(inputs), expected)


GATED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (partial(GluMlp, WIDTH, 14), (5, WIDTH)),
    "gate first": (partial(GluMlp, WIDTH, 14, act_layer=nn.SiLU, gate_last=False), (5, WIDTH)),
    "norm": (partial(GluMlp, WIDTH, 14, norm_layer=nn.LayerNorm), (5, WIDTH)),
    "map": (partial(GluMlp, WIDTH, 14, use_conv=True), (WIDTH, 4, 4)),
}


@pytest.mark.parametrize("structure", GATED)
def test_gated_values_go_with_their_gates(structure: str) -> None:
    model, inputs = made(*GATED[structure])
    before = fingerprint(model)
    neurons = on_trial(model, NOTHING, inputs)
    assert_unchanged(model, before)
    (group,) = neurons.groups
    assert (group.name, group.size, group.ties, group.has_channels) == ("0.fc1", 7, 2, True)
    check_removed_equals_masked(model, neurons, inputs)
    model.train()(inputs).square().sum().backward()


def test_members_of_a_gated_unit_by_hand() -> None:
    (group,) = GatedUnit().groups("here", GluMlp(WIDTH, 6, norm_layer=nn.LayerNorm))
    made, norm, read = group.members
    assert (made.name, made.side, made.width) == ("here.fc1", "out", 6)
    assert made.channels.tolist() == [0, 3, 1, 4, 2, 5]
    assert made.neurons.tolist() == [0, 0, 1, 1, 2, 2]
    assert (norm.name, norm.side, norm.channels.tolist()) == ("here.norm", "both", [0, 1, 2])
    assert (read.name, read.side, read.neurons.tolist()) == ("here.fc2", "in", [0, 1, 2])


@pytest.mark.parametrize(
    "make",
    [
        partial(Mlp, WIDTH, 24),
        partial(SwiGLU, WIDTH, 24),  # torch-pruning sees which of its layers go together
        partial(GatedMlp, WIDTH, 24),
        partial(nn.Linear, WIDTH, 24),
    ],
)
def test_what_is_no_gated_unit_is_not_claimed(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert not any(GatedUnit().groups(name, part) for name, part in model.named_modules())


def test_halves_that_belong_together_otherwise_are_left_alone() -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = nn.Linear(WIDTH, 14), nn.Linear(7, WIDTH)

        def forward(self, inputs: Tensor) -> Tensor:
            both = self.make(inputs)
            return self.read(both[..., ::2] * both[..., 1::2].sigmoid())

    model, inputs = made(Neighbours, (5, WIDTH))
    neurons = on_trial(model, NOTHING, inputs)
    assert not neurons.groups
    assert list(neurons.left_alone) == ["0.make"]


def test_gated_units_of_a_model_that_is_traced_in_parts() -> None:
    if not timm.is_model("deepseek_vit_412m"):
        pytest.skip(f"timm {timm.__version__} has no deepseek_vit_412m")
    torch.manual_seed(0)
    model = timm.create_model(
        "deepseek_vit_412m", pretrained=False, depth=2, embed_dim=32, num_heads=2, img_size=28
    )
    inputs = torch.randn(2, 3, 28, 28)
    neurons = discover(model.eval(), inputs, timeout=6)
    gated = [group for group in neurons.groups if group.name.endswith("mlp.fc1")]
    assert len(gated) == 2
    assert all(group.ties == 2 for group in gated)
    check_removed_equals_masked(model.double(), neurons, inputs.double())


class FusedAndGrouped(nn.Module):
    """One layer makes four query heads and two key heads; as wide as a gated unit by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 3
        self.qkv_proj, self.o_proj = nn.Linear(12, 24), nn.Linear(12, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.qkv_proj(tokens).split((12, 6, 6), -1)
        query, key, value = (part.unflatten(-1, (-1, 3)).transpose(1, 2) for part in parts)
        key, value = (part.repeat_interleave(2, 1) for part in (key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class ApartWithBias(nn.Module):
    """Attention with names that no adapter knows, and a bias by head."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))
        self.bias = nn.Embedding(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (
            layer(tokens).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        places = torch.arange(tokens.shape[1])
        bias = self.bias((places[:, None] - places).abs()).permute(2, 0, 1)
        mixed = (query @ key.mT + bias).softmax(-1) @ value
        return self.o(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attention", [FusedAndGrouped, ApartWithBias])
def test_heads_that_no_adapter_knows_are_left_alone_as_such(
    attention: Callable[[], nn.Module],
) -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention()
            self.hidden, self.head = nn.Linear(12, 9), nn.Linear(9, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.hidden(self.attention(tokens).mean(1)).relu())

    neurons = discover(Unknown().eval(), torch.randn(2, 5, 12))
    for name in ("qkv_proj",) if attention is FusedAndGrouped else ("q", "k", "v"):
        assert "heads are not recognised" in neurons.left_alone[f"attention.{name}"]
