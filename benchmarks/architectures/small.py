"""Suites of small models with random weights: transformers, detection and segmentation.

A detector is called without its last stage, which chooses boxes by their scores: its number of
boxes says nothing of whether the network computes the same. A model of texts is called with words
alone, and gives its scores.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

PACKAGES = {
    "transformers": "transformers",
    "detection": "torchvision",
    "segmentation": "torchvision",
}
OUTPUTS = {"transformers": "classes", "detection": "values", "segmentation": "classes"}
PIXELS = {"transformers": 32, "detection": 96, "segmentation": 64}
WORDS, TOKENS, CLASSES = 100, 8, 4

TEXT = {
    "vocab_size": WORDS, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 6,
}  # fmt: skip
PICTURES = {**TEXT, "image_size": 32, "patch_size": 8, "num_labels": CLASSES}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "ForSequenceClassification", TEXT),
    "distilbert": (
        "DistilBert", "ForSequenceClassification",
        {"vocab_size": WORDS, "dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 96},
    ),
    "albert": ("Albert", "ForSequenceClassification", {**TEXT, "embedding_size": 16}),
    "vit": ("ViT", "ForImageClassification", PICTURES),
    "swin": (
        "Swin", "ForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [2, 2],
         "num_heads": [3, 6], "window_size": 4, "num_labels": CLASSES},
    ),
    "llama": ("Llama", "ForCausalLM", {**TEXT, "num_key_value_heads": 6}),
    "qwen2": (
        "Qwen2", "ForCausalLM", {**TEXT, "num_key_value_heads": 3, "tie_word_embeddings": True}
    ),
    "gpt2": (
        "GPT2", "LMHeadModel",
        {"vocab_size": WORDS, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64},
    ),
    "t5": (
        "T5", "ForConditionalGeneration",
        {"vocab_size": WORDS, "d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 2,
         "num_heads": 6},
    ),
}  # fmt: skip
OF_PICTURES = ("vit", "swin")

DETECTION = (
    "ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"
)  # fmt: skip
SEGMENTATION = (
    "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"
)  # fmt: skip


def names(suite: str) -> tuple[str, ...]:
    """The models of a suite."""
    known = {
        "transformers": tuple(TRANSFORMERS), "detection": DETECTION, "segmentation": SEGMENTATION
    }  # fmt: skip
    return known[suite]


def create(suite: str, name: str) -> nn.Module:
    """A model of a suite, with random weights."""
    if suite == "transformers":
        return _transformer(name)
    network = torchvision.models.get_model(
        name, weights=None, weights_backbone=None, num_classes=CLASSES
    )
    return RawDetector(network) if suite == "detection" else network


def inputs(suite: str, name: str, samples: int) -> Tensor:
    """Random pictures or words."""
    if suite == "transformers" and name not in OF_PICTURES:
        return torch.randint(3, WORDS, (samples, TOKENS))
    return torch.randn(samples, 3, PIXELS[suite], PIXELS[suite])


def _transformer(name: str) -> nn.Module:
    transformers: Any = importlib.import_module("transformers")

    transformers.logging.set_verbosity_error()
    prefix, task, sizes = TRANSFORMERS[name]
    own: dict[str, Any] = {} if name in OF_PICTURES else {"num_labels": CLASSES}
    configuration = getattr(transformers, f"{prefix}Config")(**{**own, **sizes})
    network: nn.Module = getattr(transformers, prefix + task)(configuration)
    return Scores(network, name == "t5")


class Scores(nn.Module):
    """A model of transformers that takes a tensor and gives its scores.

    Args:
        decodes: Whether it has a decoder of its own, which gets the same words.
    """

    def __init__(self, network: nn.Module, decodes: bool) -> None:
        super().__init__()
        self.network = network
        self.decodes = decodes
        configuration: Any = network.config
        self.is_classifier = configuration.num_labels == CLASSES

    def forward(self, given: Tensor) -> Tensor:
        more = {"decoder_input_ids": given} if self.decodes else {}
        scores: Tensor = self.network(given, **more).logits
        return scores


class RawDetector(nn.Module):
    """A detector's scores and boxes before boxes are chosen, of the same size for any weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = network.backbone
        self.head: Any = getattr(network, "head", None)
        self.first: Any = getattr(getattr(network, "rpn", None), "head", None)
        self.second: Any = getattr(network, "roi_heads", None)

    def forward(self, pictures: Tensor) -> list[Any]:
        features = self.backbone(pictures)
        if self.head is not None:
            return [self.head(list(features.values()))]
        size = tuple(pictures.shape[-2:])
        box = pictures.new_tensor([[0.0, 0.0, size[1] / 2, size[0] / 2]])
        pooled = self.second.box_roi_pool(features, [box] * len(pictures), [size] * len(pictures))
        found = self.second.box_predictor(self.second.box_head(pooled))
        return [self.first(list(features.values())), found]
