"""Models of transformers, small and with random weights: pruned, called, saved and generating."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from nss_prune import NSSPruner, load_pruned, save_pruned
from nss_prune.errors import ArgumentError

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:no data was given:UserWarning"),
]

SAMPLES, BATCH, TOKENS, WORDS = 160, 40, 8, 100
TEXT = {"vocab_size": WORDS, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
CLASSES = {"num_labels": 4, "intermediate_size": 96}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "ForSequenceClassification", {**TEXT, **CLASSES}),
    "distilbert": (
        "DistilBert",
        "ForSequenceClassification",
        {"vocab_size": WORDS, "dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 96,
         "num_labels": 4},
    ),
    "albert": ("Albert", "ForSequenceClassification", {**TEXT, **CLASSES, "embedding_size": 16}),
    "vit": (
        "ViT",
        "ForImageClassification",
        {**TEXT, **CLASSES, "image_size": 32, "patch_size": 8},
    ),
    "swin": (
        "Swin",
        "ForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6],
         "window_size": 4, "num_labels": 4},
    ),
    "llama": ("Llama", "ForCausalLM", {**TEXT, "intermediate_size": 96, "num_key_value_heads": 6}),
    "qwen2": (
        "Qwen2",
        "ForCausalLM",
        {**TEXT, "intermediate_size": 96, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "phi3": (
        "Phi3",
        "ForCausalLM",
        {**TEXT, "intermediate_size": 96, "num_key_value_heads": 6, "pad_token_id": 0,
         "eos_token_id": 1},
    ),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {"vocab_size": WORDS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64},
    ),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        {"vocab_size": WORDS, "d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 6,
         "decoder_start_token_id": 0},
    ),
}  # fmt: skip
CONFIGURED = ("bert", "distilbert", "albert", "vit", "llama", "qwen2")
GENERATING = ("llama", "qwen2", "phi3", "gpt2", "t5")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(name: str) -> nn.Module:
    prefix, task, sizes = ARCHITECTURES[name]
    configuration = getattr(transformers, f"{prefix}Config")(**sizes)
    model: nn.Module = getattr(transformers, prefix + task)(configuration).eval()
    if name == "gpt2":
        with_linear_layers(model)
    return model


def with_linear_layers(model: nn.Module) -> None:
    """Linear layers in the place of the Conv1D of transformers, as the error says."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Conv1D":
            linear = nn.Linear(*layer.weight.shape)
            linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
            linear.bias = layer.bias
            around, _, last = name.rpartition(".")
            setattr(model.get_submodule(around), last, linear)


def batches(name: str) -> list[dict[str, torch.Tensor]]:
    """Dicts with labels and, of texts, a mask."""
    labels = torch.arange(SAMPLES) % 4
    if name in ("vit", "swin"):
        whole = {"pixel_values": torch.randn(SAMPLES, 3, 32, 32), "labels": labels}
    else:
        words = torch.randint(3, WORDS, (SAMPLES, TOKENS))
        whole = {
            "input_ids": words,
            "attention_mask": torch.ones(SAMPLES, TOKENS, dtype=torch.long),
            "labels": words if name in GENERATING else labels,
        }
    return [
        {key: value[at : at + BATCH] for key, value in whole.items()}
        for at in range(0, SAMPLES, BATCH)
    ]


def example(data: list[dict[str, torch.Tensor]], name: str) -> dict[str, torch.Tensor]:
    """Two samples; only an encoder-decoder needs the labels to be called."""
    names = [key for key in data[0] if key != "labels" or name == "t5"]
    return {key: data[0][key][:2] for key in names}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_parameter_budget_is_met_and_removed_equals_masked(name: str) -> None:
    model, data = made(name), batches(name)
    inputs = example(data, name)
    whole = copy.deepcopy(model)
    pruner = NSSPruner(model, inputs, params_budget=0.7, data=data, fold=False, progress=False)
    pruner.step()
    before = sum(value.numel() for value in whole.parameters())
    after = sum(value.numel() for value in model.parameters())
    assert after / before == pytest.approx(0.7, abs=0.01)
    with torch.no_grad():
        smaller = model(**inputs).logits
        with pruner.slice.masked(whole):
            masked = whole(**inputs).logits
    torch.testing.assert_close(smaller, masked, rtol=1e-4, atol=1e-5)
    if name in GENERATING:
        words = data[0]["input_ids"][:1]
        made_of = model.generate(words, max_new_tokens=4, do_sample=False)
        assert made_of.shape[1] >= (1 if name == "t5" else TOKENS + 1)


def test_tied_embeddings_stay_one_tensor() -> None:
    model, data = made("qwen2"), batches("qwen2")
    pruner = NSSPruner(
        model, example(data, "qwen2"), tp.importance.MagnitudeImportance(), pruning_ratio=0.5
    )
    pruner.step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (WORDS, 24)


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_configuration_follows_and_loads(name: str, tmp_path: Path) -> None:
    """Half of all heads and channels: a number for all layers, which the format can say."""
    model, inputs = made(name), example(batches(name), name)
    pruner = NSSPruner(
        model, inputs, tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        prune_num_heads=True, head_pruning_ratio=0.5,
    )  # fmt: skip
    pruner.step()
    assert model.config.num_attention_heads == (2 if name == "qwen2" else 3)
    assert model.config.hidden_size == 24
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    if name in GENERATING:
        words = inputs["input_ids"][:1]
        assert torch.equal(
            again.generate(words, max_new_tokens=4, do_sample=False),
            model.generate(words, max_new_tokens=4, do_sample=False),
        )


def test_what_a_configuration_cannot_say_is_in_the_report(tmp_path: Path) -> None:
    model, data = made("llama"), batches("llama")
    pruner = NSSPruner(model, example(data, "llama"), params_budget=0.7, data=data, progress=False)
    pruner.step()
    assert any("nss_prune.save_pruned" in note for note in pruner.report.notes)
    assert model.config.intermediate_size == 96
    save_pruned(model, tmp_path / "smaller.safetensors")
    again = load_pruned(tmp_path / "smaller.safetensors", made("llama")).eval()
    words = data[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(words).logits, model(words).logits)


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("prefix", ["Qwen2", "Qwen3"])
def test_heads_that_share_keys_go_by_an_importance(prefix: str, interactive: bool) -> None:
    sizes = {**TEXT, "intermediate_size": 96, "num_key_value_heads": 3, "head_dim": 8}
    configuration = getattr(transformers, f"{prefix}Config")(**sizes)
    model = getattr(transformers, f"{prefix}ForCausalLM")(configuration).eval()
    words = torch.randint(3, WORDS, (2, TOKENS))
    heads = {}
    for layer in model.model.layers:
        around = layer.self_attn
        heads.update({around.q_proj: 6, around.k_proj: 3, around.v_proj: 3})
    pruner = NSSPruner(
        model, {"input_ids": words}, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5,
        num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.5,
    )  # fmt: skip
    if interactive:
        for group in pruner.step(interactive=True):
            group.prune()
    else:
        pruner.step()
    for layer in model.model.layers:
        around = layer.self_attn
        made_of = [around.q_proj, around.k_proj, around.v_proj]
        assert [pruner.num_heads[projection] for projection in made_of] == [2, 1, 1]
        assert [projection.out_features for projection in made_of] == [16, 8, 8]
    assert model.generate(words[:1], max_new_tokens=3, do_sample=False).shape == (1, TOKENS + 3)


def test_conv1d_is_refused_with_the_remedy() -> None:
    prefix, task, sizes = ARCHITECTURES["gpt2"]
    model = getattr(transformers, prefix + task)(transformers.GPT2Config(**sizes))
    with pytest.raises(ArgumentError, match=r"Conv1D of transformers.*nn\.Linear"):
        NSSPruner(model, {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)})
