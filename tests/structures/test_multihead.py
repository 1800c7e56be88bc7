"""torch's own attention: the same outputs headwise, heads removed equal heads masked."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from networks import assert_unchanged, fingerprint
from nss_prune import NSSPruner, load_pruned, save_pruned
from nss_prune.allocation.budget import mac_share
from nss_prune.core.multihead import HeadwiseAttention, heads_called
from nss_prune.discovery.whole import discover
from nss_prune.graph.costs import measure
from nss_prune.graph.slices import Slice
from nss_prune.surgery.removal import remove
from nss_prune.surgery.trial import verified

WIDTH = 12


class Crossed(nn.Module):
    """Queries from all tokens, keys and values from some."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        widths = {"kdim": arguments.get("kdim", WIDTH), "vdim": arguments.get("vdim", WIDTH)}
        self.query, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.key, self.value = nn.Linear(6, widths["kdim"]), nn.Linear(6, widths["vdim"])
        self.attention = nn.MultiheadAttention(WIDTH, 4, **arguments)

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.attention.batch_first:
            tokens = tokens.transpose(0, 1)
        parts = (self.query(tokens), self.key(tokens), self.value(tokens))
        mixed = self.attention(*parts)[0]
        return self.head(mixed.mean(1 if self.attention.batch_first else 0))


class Encoded(nn.Module):
    """An encoder, and a decoder behind it."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        arguments: dict[str, Any] = {"batch_first": batch_first, "norm_first": norm_first}
        self.stem, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 4, 20, **arguments), 2, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(WIDTH, 4, 20, **arguments), 1
        )
        self.batch_first = batch_first

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.stem(tokens if self.batch_first else tokens.transpose(0, 1))
        return self.head(self.decoder(stream, self.encoder(stream)).mean(int(self.batch_first)))


MODELS = {
    "sequence first": lambda: Crossed(),
    "batch first": lambda: Crossed(batch_first=True),
    "no biases": lambda: Crossed(batch_first=True, bias=False),
    "keys and values of other widths": lambda: Crossed(batch_first=True, kdim=7, vdim=9),
    "transformer": lambda: Encoded(),
    "transformer, sequence first": lambda: Encoded(False),
    "transformer, norm first": lambda: Encoded(norm_first=True),
}


@pytest.mark.parametrize("masks", ["none", "truth values", "added", "of each head"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_headwise_attention_is_torchs(masks: str, batch_first: bool, need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=batch_first).double().eval()
    query, other = torch.randn(3, 5, WIDTH).double(), torch.randn(3, 7, WIDTH).double()
    if not batch_first:
        query, other = query.transpose(0, 1), other.transpose(0, 1)
    above = torch.ones(5, 7, dtype=torch.bool).triu(3)
    padding = torch.arange(7)[None] >= torch.tensor([[7], [6], [7]])
    arguments: dict[str, Any] = {
        "none": {},
        "truth values": {"attn_mask": above, "key_padding_mask": padding},
        "added": {"attn_mask": torch.randn(5, 7).double()},
        "of each head": {"attn_mask": torch.randn(12, 5, 7).double()},
    }[masks]
    wanted = attention(query, other, other, need_weights=need_weights, **arguments)
    seen: list[Tensor] = []
    with heads_called(attention):
        attention.out_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        found = attention(query, other, other, need_weights=need_weights, **arguments)
    assert type(attention) is nn.MultiheadAttention
    assert len(seen) == 1
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-12)
    else:
        assert found[1] is wanted[1] is None


def test_tokens_without_samples() -> None:
    attention = nn.MultiheadAttention(WIDTH, 4).double().eval()
    tokens = torch.randn(5, WIDTH).double()
    wanted = attention(tokens, tokens, tokens, average_attn_weights=False)
    with heads_called(attention):
        found = attention(tokens, tokens, tokens, average_attn_weights=False)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_heads_removed_equal_heads_masked(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    example, inputs = torch.zeros(2, 5, 6).double(), torch.randn(3, 5, 6).double()
    before = fingerprint(model)
    neurons = verified(model, discover(model, example), example)
    assert_unchanged(model, before)
    heads = [group for group in neurons.groups if group.name.endswith("out_proj")]
    assert len(heads) == sum(isinstance(m, nn.MultiheadAttention) for m in model.modules())
    kept = {group.name: torch.arange(group.size) % 3 != 1 for group in neurons.groups}
    critical = Slice(kept, neurons.groups)
    smaller = copy.deepcopy(model)
    remove(smaller, critical, example)
    with torch.no_grad(), critical.masked(model):
        masked = model(inputs)
    with torch.no_grad():
        assert (model(inputs) - masked).abs().max() > 1e-3
        assert (smaller(inputs) - masked).abs().max() < 1e-12
        for module in smaller.modules():
            if isinstance(module, nn.MultiheadAttention):
                assert type(module) is HeadwiseAttention
                assert module.num_heads == 3
                assert module.out_proj.in_features == 9
        wanted = smaller(inputs)
        assert torch.equal(pickle.loads(pickle.dumps(smaller))(inputs), wanted)
        assert torch.equal(copy.deepcopy(smaller)(inputs), wanted)
        save_pruned(smaller, tmp_path / "smaller.safetensors")
        loaded = load_pruned(tmp_path / "smaller.safetensors", MODELS[name]().double().eval())
        assert torch.equal(loaded(inputs), wanted)
    smaller.train()(inputs).square().sum().backward()


def test_heads_are_measured_and_folded_within_the_budget() -> None:
    torch.manual_seed(0)
    model = Encoded(False).eval()
    batches = [(torch.randn(30, 5, 6), torch.arange(30) % 4) for _ in range(4)]
    pruner = NSSPruner(model, batches[0][0][:2], params_budget=0.7, data=batches, progress=False)
    pruner.step()
    share = pruner.report.after.parameters / pruner.report.before.parameters
    assert abs(share - 0.7) < 0.01 or any("the budget is" in note for note in pruner.report.notes)
    assert model(batches[0][0]).isfinite().all()


class Residual(nn.Module):
    """Attention around which the residual stream goes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 4)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.stem(tokens)
        mixed = self.attention(stream, stream, stream, need_weights=False)[0]
        return self.head((stream + mixed).mean(1))


@pytest.mark.parametrize("arguments", [{"params_budget": 0.7}, {"theta": 0.6}], ids=str)
@pytest.mark.parametrize("make", [Residual, *MODELS.values()], ids=["residual", *MODELS])
def test_what_is_planned_is_what_is_removed(
    make: Callable[[], nn.Module], arguments: dict[str, float]
) -> None:
    """Nothing is ignored: a width that attention alone consumes is left alone by name."""
    torch.manual_seed(0)
    model = make().double().eval()
    batches = [(torch.randn(30, 5, 6).double(), torch.arange(30) % 4) for _ in range(2)]
    inputs = torch.randn(3, 5, 6).double()
    pruner = NSSPruner(
        model, batches[0][0][:2], data=batches, round_to=1, fold=False, progress=False, **arguments
    )
    planned, neurons = pruner.slice, pruner.neurons
    makers = {member.name for group in neurons.groups for member in group.makers}
    linear = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert linear <= makers | set(neurons.left_alone)
    for name in linear - makers - {"head"}:
        assert "nn.MultiheadAttention" in neurons.left_alone[name]
    with planned.masked(model), torch.no_grad():
        masked = model(inputs)
    pruner.step()
    assert pruner.slice.kept.keys() == planned.kept.keys()
    for name, kept in planned.kept.items():
        assert torch.equal(pruner.slice.kept[name], kept)
        layer = model.get_submodule(name)
        if type(layer) is nn.Linear:
            assert layer.out_features == int(kept.sum())
        else:
            assert layer.in_features == WIDTH // 4 * int(kept.sum())
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), masked, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [Residual, *MODELS.values()], ids=["residual", *MODELS])
def test_macs_of_a_slice_are_those_of_the_smaller_model(make: Callable[[], nn.Module]) -> None:
    """Of its width and of its heads, together."""
    torch.manual_seed(0)
    model, inputs = make().eval(), torch.randn(3, 5, 6)
    neurons = NSSPruner(model, inputs, params_budget=0.9, progress=False).neurons
    share = mac_share(neurons.groups, model, 1, inputs)
    kept = {group.name: torch.arange(group.size) % 2 == 0 for group in neurons.groups}
    critical = Slice(kept, neurons.groups)
    predicted = share(critical)
    remove(model, critical, inputs)
    assert predicted == pytest.approx(measure(model, inputs).macs, rel=1e-9)


def test_a_failed_removal_leaves_the_class() -> None:
    model = Crossed(batch_first=True).eval()
    example = torch.randn(2, 5, 6)
    neurons = discover(model, example)
    kept = {"attention.out_proj": torch.tensor([True, False, True, False])}

    def fails(module: nn.Module, inputs: Tensor) -> Tensor:
        if module.attention.num_heads == 2 and module is model:
            raise ValueError("no")
        return module(inputs)

    with pytest.raises(Exception, match="no"):
        remove(model, Slice(kept, neurons.groups), example, forward=fails)
    assert type(model.attention) is nn.MultiheadAttention
    assert model.attention.num_heads == 4
    model(example)


def by_definition(attention: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """Self-attention of ``[samples, tokens, width]``, token by token and head by head."""
    queries, keys, values = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)
    outputs = torch.zeros(*tokens.shape[:2], attention.out_proj.in_features, dtype=tokens.dtype)
    size = attention.head_dim
    for sample, rows in enumerate(tokens):
        q, k, v = (
            rows @ weight.T + bias
            for weight, bias in zip((queries, keys, values), biases, strict=True)
        )
        for first in range(0, attention.num_heads * size, size):
            part = slice(first, first + size)
            for position in range(len(rows)):
                scores = torch.stack([q[position, part] @ row[part] for row in k]) / size**0.5
                outputs[sample, position, part] = scores.softmax(0) @ v[:, part]
    return outputs @ attention.out_proj.weight.T + attention.out_proj.bias


@pytest.mark.parametrize("heads", [False, True])
def test_the_width_goes_apart_from_the_heads(heads: bool) -> None:
    """Columns of in_proj and rows of out_proj go; what is left is attention by its definition."""
    torch.manual_seed(0)
    model = Residual().double().eval()
    whole, inputs = copy.deepcopy(model), torch.randn(3, 5, 6).double()
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = NSSPruner(
        model, inputs, importance, pruning_ratio=0.5, fold=False, progress=False,
        prune_num_heads=heads, head_pruning_ratio=0.5 * heads,
    )  # fmt: skip
    pruner.step()
    attention = model.attention
    rows = 3 * 3 * (2 if heads else 4)
    assert attention.in_proj_weight.shape == (rows, WIDTH // 2)
    assert attention.out_proj.weight.shape == (WIDTH // 2, rows // 3)
    assert attention.embed_dim == attention.kdim == attention.vdim == WIDTH // 2
    kept = pruner.slice.kept["stem"]
    assert torch.equal(model.stem.weight, whole.stem.weight[kept])
    with torch.no_grad():
        stream = model.stem(inputs)
        wanted = model.head((stream + by_definition(attention, stream)).mean(1))
        torch.testing.assert_close(model(inputs), wanted, rtol=1e-12, atol=1e-12)
        with pruner.slice.masked(whole):
            masked = whole(inputs)
    torch.testing.assert_close(model(inputs), masked, rtol=1e-12, atol=1e-12)
    exported = torch.export.export(model, (inputs,)).module()(inputs)
    torch.testing.assert_close(exported, masked, rtol=1e-12, atol=1e-12)


class Whole(nn.Module):
    """nn.Transformer asserts that what it is given is as wide as ``d_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(6, WIDTH), nn.Linear(6, WIDTH)
        self.both = nn.Transformer(WIDTH, 4, 1, 1, 20, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.both(self.source(tokens), self.target(tokens)).mean(1))


@pytest.mark.parametrize("make", [Whole, lambda: Encoded(False), lambda: Encoded(norm_first=True)])
def test_a_ratio_reaches_the_trunk(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    whole, inputs = copy.deepcopy(model), torch.randn(8, 5, 6).double()
    data = [(inputs, torch.arange(8) % 4)]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = NSSPruner(
        model, inputs[:2], importance, pruning_ratio=0.5, data=data, prune_num_heads=True,
        head_pruning_ratio=0.5, progress=False,
    )  # fmt: skip
    pruner.step()
    sizes = [sum(parameter.numel() for parameter in m.parameters()) for m in (model, whole)]
    assert sizes[0] < 0.3 * sizes[1]
    assert not any("pruning_ratio asks" in note for note in pruner.report.notes)
    assert model(inputs).shape == (8, 4)


def test_a_width_of_other_attention_is_left_alone_by_name() -> None:
    model = Residual().eval()
    model.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True, add_bias_kv=True)
    neurons = NSSPruner(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), model),
        torch.randn(2, 5, 6), params_budget=0.9,
    ).neurons  # fmt: skip
    assert "add_bias_kv" in neurons.left_alone["3.stem"]
    assert [group.name for group in neurons.groups] == ["0", "2"]
