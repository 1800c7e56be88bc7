"""The layer that makes the class scores, by its place or by trial."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks import Residual, assert_unchanged, cnn, fingerprint
from nss_prune.core.classifier import (
    find_classifier,
    find_classifier_by_shift,
    outputs_of,
    shifted_bias,
)
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError


class Scored(nn.Module):
    """A Linear layer for the scores, and another one registered behind it that makes none."""

    def __init__(self, bias: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.scores = nn.Linear(8, 4, bias=bias)
        self.auxiliary = nn.Linear(8, 4)
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs).relu()
        self.auxiliary(hidden)
        return self.scale * self.scores(hidden)


def segmenter() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1))


def test_by_default_the_last_linear_layer_or_else_the_last_convolution() -> None:
    assert find_classifier(cnn()) == "9"
    assert find_classifier(segmenter()) == "2"
    late = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 1))
    assert find_classifier(late) == "0"
    with pytest.raises(ArgumentError, match="head="):
        find_classifier(nn.ReLU())


def test_the_one_given() -> None:
    model = Scored()
    assert find_classifier(model, "scores") == "scores"
    assert find_classifier(model, model.body) == "body"
    with pytest.raises(ModelMismatchError, match="'nothing'"):
        find_classifier(model, "nothing")
    with pytest.raises(ModelMismatchError, match="not in the model"):
        find_classifier(model, nn.Linear(8, 4))


@pytest.mark.parametrize("bias", [True, False])
def test_by_trial_the_last_whose_bias_moves_the_scores_by_as_much(bias: bool) -> None:
    inputs = torch.randn(3, 6)
    for model, expected in (
        (Scored(bias), "scores"),
        (Scored(bias, scale=2.0), None),
        (Residual(), "head"),
    ):
        model.train()
        before = fingerprint(model)
        assert find_classifier_by_shift(model, inputs) == expected
        assert_unchanged(model, before)
    pictures = torch.randn(2, 3, 12, 12).double()
    assert find_classifier_by_shift(cnn().eval(), pictures) == "9"
    assert find_classifier_by_shift(segmenter().double(), pictures) == "2"
    with pytest.raises(DataError):
        find_classifier_by_shift(Scored(), torch.randn(3, 7))


def test_by_trial_of_the_scores_that_are_asked_for_and_as_the_model_is_called() -> None:
    class TwoHeaded(Scored):
        def forward(self, inputs: Tensor) -> dict[str, Tensor]:
            hidden = self.body(inputs).relu()
            return {"main": self.scores(hidden), "other": self.auxiliary(hidden)}

    batch = {"given": torch.randn(3, 6)}
    for key, expected in (("main", "scores"), ("other", "auxiliary")):
        found = find_classifier_by_shift(
            TwoHeaded(),
            batch,
            scores=lambda outputs, key=key: outputs[key],
            forward=lambda model, inputs: model(inputs["given"]),
        )
        assert found == expected


def test_widths() -> None:
    assert outputs_of(cnn(), "4") == 10
    assert outputs_of(cnn(), "9") == 5
    assert outputs_of(nn.Sequential(nn.ConvTranspose2d(3, 7, 2)), "0") == 7
    assert outputs_of(nn.Sequential(nn.Embedding(9, 2)), "0") == 9


@pytest.mark.parametrize("bias", [True, False])
def test_a_shifted_bias_is_a_new_one(bias: bool) -> None:
    layer = nn.Linear(3, 2, bias=bias).bfloat16().requires_grad_(False)
    old = torch.zeros(2) if layer.bias is None else layer.bias.clone().float()
    made = shifted_bias(layer, torch.tensor([1.0, -2.0]).double())
    assert made is not layer.bias
    assert made.dtype == torch.bfloat16
    assert not made.requires_grad
    assert torch.equal(made, (old + torch.tensor([1.0, -2.0])).bfloat16())
