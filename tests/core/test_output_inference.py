"""What outputs mean, by their shapes and labels or by what the user says."""

from __future__ import annotations

import math
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nss_prune.core.outputs import Outputs, resolve_outputs
from nss_prune.errors import ArgumentError, DataError

N = 12


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def classes(*shape: int, count: int = 5) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape) % count


def binary(*shape: int) -> Tensor:
    return classes(*shape, count=2)


TABLE: list[tuple[str, tuple[int, ...], Tensor | None, str, int | None]] = [
    ("classes of integers", (N, 5), classes(N), "classes", 1),
    ("a column of integers", (N, 5), classes(N, 1), "classes", 1),
    ("no labels", (N, 5), None, "classes", 1),
    ("two classes", (N, 2), binary(N), "classes", 1),
    ("convolutional head", (N, 5, 1, 1), classes(N), "classes", 1),
    ("several labels", (N, 5), binary(N, 5), "labels", 1),
    ("several labels as numbers", (N, 5), binary(N, 5).float(), "labels", 1),
    ("regression", (N, 5), torch.rand(N, 5), "values", 1),
    ("one logit", (N, 1), binary(N), "labels", 1),
    ("one logit, a column", (N, 1), binary(N, 1), "labels", 1),
    ("one logit, numbers", (N, 1), binary(N, 1).float(), "labels", 1),
    ("one logit without an axis", (N,), binary(N), "labels", None),
    ("one logit, truth values", (N, 1), binary(N) > 0, "labels", 1),
    ("one value", (N, 1), torch.rand(N), "values", 1),
    ("one value without an axis", (N,), torch.rand(N, 1), "values", None),
    ("one count", (N, 1), classes(N), "values", 1),
    ("one output, no labels", (N, 1), None, "values", 1),
    ("one output without an axis, no labels", (N,), None, "values", None),
    ("segmentation", (N, 5, 4, 6), classes(N, 4, 6), "classes", 1),
    ("segmentation with its axis last", (N, 4, 6, 5), classes(N, 4, 6), "classes", 3),
    ("volumes", (N, 5, 2, 4, 6), classes(N, 2, 4, 6), "classes", 1),
    ("binary segmentation", (N, 1, 4, 6), binary(N, 4, 6), "labels", 1),
    ("binary segmentation, like shapes", (N, 1, 4, 6), binary(N, 1, 4, 6).float(), "labels", 1),
    ("pictures", (N, 3, 4, 6), torch.rand(N, 3, 4, 6), "values", 1),
    ("one channel", (N, 1, 4, 6), torch.rand(N, 4, 6), "values", 1),
    ("tokens", (N, 7, 5), classes(N, 7), "classes", 2),
    ("signals", (N, 5, 7), classes(N, 7), "classes", 1),
    ("values of tokens", (N, 7, 5), torch.rand(N, 7, 5), "values", 2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "labels", "kind", "axis"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_what_one_output_means(shape, labels, kind, axis) -> None:
    outputs = torch.randn(shape)
    described = resolve_outputs(None, outputs, labels)
    (part,) = described.parts
    assert (part.kind, part.axis, part.path) == (kind, axis, ())
    assert described.divergence(outputs, outputs + torch.randn(shape)).shape == (N,)
    outputs.requires_grad_()
    described.loss(outputs, labels).backward()
    assert outputs.grad.isfinite().all()
    assert outputs.grad.any()


UNCERTAIN: list[tuple[str, Any, Any]] = [
    ("maps without labels", torch.randn(N, 5, 4, 4), None),
    ("tokens without labels", torch.randn(N, 7, 5), None),
    ("as many tokens as classes", torch.randn(N, 5, 5), classes(N, 5)),
    ("maps with labels of pictures", torch.randn(N, 5, 4, 4), classes(N)),
    ("labels of other samples", torch.randn(N, 5), classes(N + 1)),
    ("numbers for classes", torch.randn(N, 5), torch.rand(N)),
    ("shares of classes", torch.randn(N, 5), torch.rand(N, 5).softmax(1)),
    ("labels in a dict", torch.randn(N, 5), {"boxes": torch.rand(N, 4)}),
    ("two outputs without labels", (torch.randn(N, 5), torch.randn(N, 4)), None),
    ("two outputs that labels fit", (torch.randn(N, 50), torch.randn(N, 60)), classes(N)),
    ("features before the scores", (torch.randn(N, 50), torch.randn(N, 5)), classes(N)),
    ("another beside that with values", (torch.randn(N, 5), torch.randn(N, 4)), torch.rand(N, 4)),
    ("labels for one of two", {"a": torch.randn(N, 5), "b": torch.randn(N, 4)}, {"a": classes(N)}),
    ("another first axis", (torch.randn(N, 5), torch.randn(7, 4)), classes(N)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("outputs", "labels"), [row[1:] for row in UNCERTAIN], ids=[row[0] for row in UNCERTAIN]
)
def test_what_is_not_certain_is_asked_for(outputs, labels) -> None:
    with pytest.raises(ArgumentError, match="outputs='classes'"):
        resolve_outputs(None, outputs, labels)


@dataclass
class Detected:
    scores: Tensor
    boxes: Tensor
    count: int = 3


Pair = namedtuple("Pair", ["scores", "aux"])


class Logits:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@dataclass
class ModelOutput(OrderedDict):  # as transformers has it
    loss: Any = None
    logits: Any = None
    pred_boxes: Any = None
    hidden_states: Any = None
    past_key_values: Any = None

    def __post_init__(self) -> None:
        self.update({k: v for k, v in vars(self).items() if v is not None})


def kinds(described: Outputs) -> dict[tuple[Any, ...], str]:
    return {part.path: part.kind for part in described.parts}


def test_what_several_outputs_mean() -> None:
    five, four, same = torch.randn(N, 5), torch.randn(N, 4), torch.randn(N, 5)
    labels = classes(N)
    assert kinds(resolve_outputs(None, (five, four), labels)) == {(0,): "classes", (1,): "values"}
    assert kinds(resolve_outputs(None, [four, five], labels)) == {(0,): "values", (1,): "classes"}
    found = resolve_outputs(None, {"out": five, "aux": same, "step": torch.tensor(1.0)}, labels)
    assert kinds(found) == {("out",): "classes", ("aux",): "classes"}
    assert kinds(resolve_outputs(None, {"out": five, "aux": same})) == kinds(found)
    found = resolve_outputs(None, {"heads": {"a": five, "b": [four]}, "ids": labels}, labels)
    assert kinds(found) == {("heads", "a"): "classes", ("heads", "b", 0): "values"}
    found = resolve_outputs(None, Detected(five, four), labels)
    assert kinds(found) == {("scores",): "classes", ("boxes",): "values"}
    found = resolve_outputs(None, Pair(five, same), labels)
    assert kinds(found) == {("scores",): "classes", ("aux",): "classes"}
    maps = {"out": torch.randn(N, 5, 4, 4), "aux": torch.randn(N, 5, 2, 2)}
    assert set(kinds(resolve_outputs(None, maps, classes(N, 4, 4))).values()) == {"classes"}
    own = {"scores": labels, "boxes": torch.rand(N, 4)}
    found = resolve_outputs(None, Detected(five, four), own)
    assert kinds(found) == {("scores",): "classes", ("boxes",): "values"}
    found = resolve_outputs(None, (five, torch.randn(N, 1)), (labels, binary(N)))
    assert kinds(found) == {(0,): "classes", (1,): "labels"}


def test_of_a_hugging_face_output_the_internals_do_not_count() -> None:
    output = ModelOutput(
        loss=torch.rand(N),
        logits=torch.randn(N, 7, 5),
        pred_boxes=torch.randn(N, 7, 4),
        hidden_states=(torch.randn(N, 7, 9),),
        past_key_values=((torch.randn(N, 2, 7, 3),),),
    )
    found = resolve_outputs(None, output)
    assert kinds(found) == {("logits",): "classes", ("pred_boxes",): "values"}
    assert found.parts[0].axis == 2
    assert kinds(resolve_outputs(None, Logits(torch.randn(N, 5)), classes(N))) == {
        ("logits",): "classes"
    }


# --- what the user says --------------------------------------------------------------------------


def test_what_is_named_counts() -> None:
    outputs = {
        "out": torch.randn(N, 5),
        "aux": torch.randn(N, 5),
        "extra": (torch.randn(N, 3), torch.randn(N, 2)),
    }
    found = resolve_outputs({"out": "labels", "extra": {1: "values"}}, outputs)
    assert kinds(found) == {("out",): "labels", ("extra", 1): "values"}
    found = resolve_outputs(["classes", ("classes", 0.4), ["values", "labels"]], outputs)
    assert [part.weight for part in found.parts] == [1, 0.4, 1, 1]
    assert [part.kind for part in found.parts] == ["classes", "classes", "values", "labels"]
    assert set(kinds(resolve_outputs("values", outputs)).values()) == {"values"}
    assert len(kinds(resolve_outputs("values", outputs))) == 4
    found = resolve_outputs(lambda given: given["extra"][0], outputs)
    assert kinds(found) == {(): "classes"}
    assert torch.equal(found.scores(outputs), outputs["extra"][0])
    found = resolve_outputs((lambda given: given["extra"], ["values", "values"]), outputs)
    assert kinds(found) == {(0,): "values", (1,): "values"}
    assert resolve_outputs(found, outputs) == found
    assert kinds(resolve_outputs(["labels"], torch.randn(N, 5))) == {(): "labels"}
    assert kinds(resolve_outputs({"out": None}, outputs, classes(N))) == {("out",): "classes"}


@pytest.mark.parametrize(
    ("spec", "outputs", "message"),
    [
        ("softmax", torch.randn(N, 5), "'softmax'"),
        (3, torch.randn(N, 5), "outputs is 3"),
        (["classes"], (torch.randn(N, 5), torch.randn(N, 4)), "names 1 outputs"),
        ({"logit": "classes"}, {"logits": torch.randn(N, 5)}, "names ['logit']"),
        ({}, {"logits": torch.randn(N, 5)}, "outputs is {}"),
        ("classes", torch.randn(N, 1), "whose softmax is always 1"),
        ("classes", torch.randn(N), "whose softmax is always 1"),
        (("classes", 0.0), torch.randn(N, 5), "weight"),
        (lambda given: given["out"], (torch.randn(N, 5),), "the function outputs= fails"),
    ],
)
def test_what_cannot_be_is_refused(spec, outputs, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        resolve_outputs(spec, outputs)
    assert message in str(caught.value)


def test_outputs_without_real_numbers_are_refused() -> None:
    for outputs in (classes(N), torch.tensor(1.0), "text", {"ids": classes(N)}):
        with pytest.raises(DataError, match="no real numbers"):
            resolve_outputs(None, outputs)


def test_classes_that_there_are_not_are_refused() -> None:
    with pytest.raises(DataError, match="labels run from 0 to 4, but the model has 3 classes"):
        resolve_outputs(None, torch.randn(N, 3), classes(N))


def test_outputs_that_change_are_refused() -> None:
    described = resolve_outputs(None, {"out": torch.randn(N, 5)})
    with pytest.raises(DataError, match="output 'out' is missing"):
        described.predictions({"other": torch.randn(N, 5)})
    with pytest.raises(DataError, match="5 classes on axis 1"):
        described.predictions({"out": torch.randn(N, 6)})
    with pytest.raises(DataError, match="on the same batch"):
        described.divergence({"out": torch.randn(N, 5)}, {"out": torch.randn(N - 1, 5)})
