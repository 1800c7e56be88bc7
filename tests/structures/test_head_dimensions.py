"""Dimensions inside heads: other coordinates change nothing, and removed equals projected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention as TimmAttention
from timm.layers import AttentionRope
from torch import Tensor, nn

from networks import assert_unchanged, fingerprint
from nss_prune import NSSPruner
from nss_prune.allocation.head_bases import head_bases
from nss_prune.core.outputs import outputs_of
from nss_prune.discovery.calls import Call
from nss_prune.discovery.head_dimensions import refusal, with_head_dimensions
from nss_prune.discovery.whole import discover
from nss_prune.graph.bases import change_basis, in_basis
from nss_prune.graph.slices import Slice
from nss_prune.pruner.checkpoint import load_pruned, save_pruned
from nss_prune.structures.attention import Attention
from nss_prune.structures.dimensions import HEAD_DIMENSIONS, find_dimensions
from nss_prune.structures.head_coordinates import basis_changes
from nss_prune.surgery.removal import remove

SMALL = {"num_classes": 5, "img_size": 32}
VIT = {**SMALL, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {**SMALL, "patch_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4),
        "window_size": 4}  # fmt: skip
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", **VIT),
    "deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **VIT),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", **SWIN),
}


class Separate(nn.Module):
    """Queries, keys and values from layers of their own, with a scale of its own."""

    def __init__(self, heads: int = 2, width: int = 6, channels: int = 8) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width
        self.scale = width**-0.5
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(channels, heads * width) for _ in range(3)
        )
        self.out_proj = nn.Linear(heads * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (
            layer(x).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.out_proj((attention @ v).transpose(1, 2).flatten(2))


class Around(nn.Module):
    """Attention between a layer and a classifier."""

    def __init__(self, attention: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(5, channels)
        self.attn = attention
        self.head = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.stem(x) + self.attn(self.stem(x))).mean(1))


def pictures(samples: int = 120) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(samples // 2, 3, 32, 32, generator=generator) for _ in range(2)]
    return [(batch, torch.arange(len(batch)) % 5) for batch in batches]


def tokens(samples: int = 120) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 7, 5, generator=generator).double()
    return [(inputs, torch.arange(samples) % 4)]


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[name]().eval()


def bases_of(model: nn.Module, data: Any) -> Any:
    inside = [name for name, part in model.named_modules() if HEAD_DIMENSIONS.groups(name, part)]
    outputs = outputs_of(model, data)
    found = head_bases(model, data, inside, outputs, progress=False)
    return tuple(change for changes in found.values() for change in changes)


@pytest.mark.parametrize("name", BUILDERS)
def test_new_coordinates_change_nothing(name: str) -> None:
    model = built(name).double()
    data = [(inputs.double(), labels) for inputs, labels in pictures()]
    before = fingerprint(model)
    bases = bases_of(model, data)
    assert_unchanged(model, dict(before))
    assert bases
    wanted = model(data[0][0])
    with in_basis(model, bases):
        assert (model(data[0][0]) - wanted).abs().max() <= 1e-9 * wanted.abs().max()
    assert_unchanged(model, dict(before))


@pytest.mark.parametrize("name", BUILDERS)
def test_pruner_goes_inside_heads(name: str, tmp_path: Path) -> None:
    model, data = built(name), pictures()
    inputs = data[0][0][:4]
    pruner = NSSPruner(model, inputs, macs_budget=0.6, data=data, fold=False, progress=False)
    before = fingerprint(model)
    chosen = pruner.slice
    assert_unchanged(model, dict(before))
    inside = {group.name: group for group in chosen.groups if group.is_inside_heads}
    assert any(not chosen.kept[layer].all() for layer in inside)
    with chosen.masked(model):
        masked = model(inputs)
    assert_unchanged(model, dict(before))
    chosen.save(tmp_path / "slice")
    with Slice.load(tmp_path / "slice").masked(model):
        assert torch.equal(model(inputs), masked)
    pruner.step()
    assert torch.allclose(model(inputs), masked, atol=1e-5)
    assert pruner.report is not None
    rows = {row.layer: row for row in pruner.report.rows if row.unit == "dimensions of a head"}
    assert rows.keys() == inside.keys()
    assert pruner.report.after.macs <= 0.605 * pruner.report.before.macs
    for layer, row in rows.items():
        attention = model.get_submodule(layer)
        heads = attention.num_heads
        assert attention.qkv.out_features == 3 * heads * row.after
        assert attention.proj.in_features == heads * row.after
        assert attention.scale == pytest.approx(row.after**-0.5)
        if hasattr(attention, "head_dim"):
            assert (attention.head_dim, attention.attn_dim) == (row.after, heads * row.after)
    wanted = model(inputs)
    for part in model.modules():  # both ways in which timm computes attention
        if hasattr(part, "fused_attn"):
            part.fused_attn = not part.fused_attn
    assert torch.allclose(model(inputs), wanted, atol=1e-5)
    save_pruned(model, tmp_path / "model")
    assert torch.allclose(load_pruned(tmp_path / "model", built(name))(inputs), wanted, atol=1e-5)


def test_the_budget_can_leave_heads_whole() -> None:
    model, data = built("vit"), pictures()
    pruner = NSSPruner(
        model, data[0][0][:4], macs_budget=0.6, data=data, prune_head_dims=False, progress=False
    )
    assert not any(group.is_inside_heads for group in pruner.slice.groups)
    assert not pruner.slice.bases


def test_limits_hold_inside_heads() -> None:
    model, data = built("vit"), pictures()
    pruner = NSSPruner(
        model, data[0][0][:4], macs_budget=0.3, data=data, iterative_steps=2,
        max_pruning_ratio=0.4, round_to=2, progress=False,
    )  # fmt: skip
    pruner.step()
    pruner.step()
    assert {block.attn.head_dim for block in model.blocks} <= {6, 8}  # at least 4.8 of 8


def test_heads_that_do_nothing_lose_dimensions_first() -> None:
    model, data = built("vit"), pictures()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
        model.blocks[0].attn.qkv.bias.zero_()
    wanted = model(data[0][0])
    pruner = NSSPruner(model, data[0][0][:4], macs_budget=0.85, data=data, progress=False)
    pruner.step()
    assert model.blocks[0].attn.head_dim < 8
    assert torch.allclose(model(data[0][0]), wanted, atol=1e-4)


def test_a_second_step_goes_on() -> None:
    model, data = built("vit"), pictures()
    inputs = data[0][0][:4]
    pruner = NSSPruner(model, inputs, macs_budget=0.5, data=data, iterative_steps=2, progress=False)
    pruner.step()
    between = model.blocks[0].attn.head_dim
    pruner.step()
    assert model.blocks[0].attn.head_dim <= between < 8
    assert model(inputs).isfinite().all()


def test_torch_prunings_groups_are_of_whole_heads() -> None:
    model, data = built("vit"), pictures()
    inputs = data[0][0][:4]
    pruner = NSSPruner(model, inputs, macs_budget=0.6, data=data, progress=False)
    for group in pruner.step(interactive=True):
        group.prune()
    assert model.blocks[0].attn.head_dim == 8
    assert model(inputs).isfinite().all()


def test_asking_for_what_a_budget_does_by_itself_is_no_error() -> None:
    model, data = built("vit"), pictures()
    asked = NSSPruner(
        model, data[0][0][:4], macs_budget=0.6, data=data, prune_head_dims=True, progress=False
    )
    assert asked.slice.bases


def test_an_error_leaves_the_coordinates() -> None:
    class Fails:
        def observe(self, subject: Any, evidence: Any) -> None: ...

        def before(self, subject: Any, chosen: Any, seen: Any) -> Any:
            raise RuntimeError

        after = before

    model, data = built("vit"), pictures()
    pruner = NSSPruner(
        model, data[0][0][:4], macs_budget=0.6, data=data, repairs=[Fails()], progress=False
    )
    before = fingerprint(model)
    with pytest.raises(RuntimeError):
        pruner.step()
    assert_unchanged(model, dict(before))


def projected(model: Around, bases: Any, kept: Tensor, inputs: Tensor) -> Tensor:
    """What a model gives with the products and values of its heads projected, head by head."""
    attention: Any = model.attn
    a, b, r, back = (change.matrices for change in bases)
    width = attention.head_dim
    hidden = model.stem(inputs)
    q, k, v = (
        layer(hidden).unflatten(-1, (-1, width))
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    read = []
    for head in range(attention.num_heads):
        product = a[head].T @ torch.diag(kept.double()) @ b[head]
        scores = q[:, :, head] @ product @ k[:, :, head].transpose(1, 2) / width**0.5
        values = v[:, :, head] @ (back[head] @ torch.diag(kept.double()) @ r[head]).T
        read.append(scores.softmax(-1) @ values)
    return model.head((hidden + attention.out_proj(torch.cat(read, -1))).mean(1))


def test_removed_equals_projected() -> None:
    torch.manual_seed(0)
    model, data = Around(Separate()).double(), tokens()
    inputs = data[0][0]
    bases = bases_of(model, data)
    neurons = with_head_dimensions(model, discover(model, inputs), inputs)
    kept = torch.tensor([True, True, False, True, False, False])
    chosen = Slice({"attn": kept}, neurons.groups, bases=bases)
    wanted = projected(model, bases, kept, inputs)
    with chosen.masked(model):
        assert torch.allclose(model(inputs), wanted, atol=1e-11)
    change_basis(model, bases)
    remove(model, replace(chosen, bases=()), inputs)
    assert (model.attn.head_dim, model.attn.q_proj.out_features) == (3, 6)
    assert torch.allclose(model(inputs), wanted, atol=1e-11)


def test_heads_of_low_rank_reduce_exactly() -> None:
    torch.manual_seed(0)
    model, data = Around(Separate()).double(), tokens()
    inputs = data[0][0]
    attention: Any = model.attn
    with torch.no_grad():
        for layer in (attention.q_proj, attention.v_proj):  # rank 3 of 6, biases and all
            mix = torch.randn(2, 6, 3).double() @ torch.randn(2, 3, 6).double()
            layer.weight.copy_((mix @ layer.weight.view(2, 6, -1)).flatten(0, 1))
            layer.bias.copy_((mix @ layer.bias.view(2, 6, 1)).flatten())
    wanted = model(inputs)
    bases = bases_of(model, data)
    neurons = with_head_dimensions(model, discover(model, inputs), inputs)
    change_basis(model, bases)
    remove(model, Slice({"attn": torch.arange(6) < 3}, neurons.groups), inputs)
    assert attention.v_proj.out_features == 6
    assert (model(inputs) - wanted).abs().max() <= 1e-9 * wanted.abs().max()


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (lambda: TimmAttention(8, 2, qk_norm=True, norm_layer=nn.LayerNorm), "q_norm, k_norm"),
        (lambda: TimmAttention(8, 2, scale_norm=True, norm_layer=nn.LayerNorm), "norm"),
        (lambda: TimmAttention(8, 2, gated=True), "gate"),
        (lambda: AttentionRope(8, 4, num_kv_heads=2, qkv_fused=False), "share"),
    ],
)
def test_what_is_left_alone_says_why(attention: Callable[[], nn.Module], reason: str) -> None:
    found = find_dimensions(attention())
    assert isinstance(found, str)
    assert reason in found


def test_rotary_positions_are_found_on_trial() -> None:
    torch.manual_seed(0)
    module = AttentionRope(8, 2, num_prefix_tokens=0).eval()
    x, rope = torch.randn(2, 5, 8), torch.randn(5, 8)
    assert refusal(module, Call((x,), {"rope": rope})) is not None
    assert refusal(module, Call((x,), {})) is None


def test_unfused_scores_and_random_coordinates() -> None:
    torch.manual_seed(0)
    module = TimmAttention(8, 2, qkv_bias=True).double().eval()
    x = torch.randn(3, 5, 8).double()
    found = find_dimensions(module)
    assert not isinstance(found, str)
    turned = copy.deepcopy(module)
    matrices = torch.randn(2, 2, 4, 4).double()
    change_basis(turned, basis_changes("", found, *matrices))
    assert torch.allclose(turned(x), module(x), atol=1e-10)
    assert Attention().groups("", module)[0].size == 2
