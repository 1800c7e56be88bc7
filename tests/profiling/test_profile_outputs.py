"""profile() of models whose outputs are no single softmax, against sample-by-sample oracles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from networks import assert_unchanged, fingerprint
from nss_prune import profile
from nss_prune.core.outputs import outputs_of
from nss_prune.errors import ArgumentError, DataError

SAMPLES = 40


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def dense(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, outputs)).double()


def convolutional(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1)
    ).double()


def classes(*shape: int, count: int) -> Tensor:
    return torch.randint(count, shape)


def gaussian(outputs: Tensor, labels: Tensor, everything: Tensor) -> Tensor:
    """½ Σ (y − t)² / σ², with σ² of each channel over everything that the model puts out."""
    axis = 2 if everything.dim() == 3 else 1
    channels = everything.movedim(axis, -1).flatten(0, -2)
    errors = (outputs - labels).movedim(axis, -1)
    return (errors.square() / channels.var(0) / 2).sum()


def binary(outputs: Tensor, labels: Tensor, everything: Tensor) -> Tensor:
    chances = outputs.flatten().sigmoid()
    truths = labels.flatten().double()
    return -(truths * chances.log() + (1 - truths) * (1 - chances).log()).sum()


def on_axis(axis: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, labels: Tensor, everything: Tensor) -> Tensor:
        chances = outputs.softmax(axis).movedim(axis, -1).flatten(0, -2)
        places = labels.flatten()
        return -sum(chances[i, c].log() for i, c in enumerate(places.tolist()))

    return loss


FLAT, MAPS, TOKENS = (SAMPLES, 6), (SAMPLES, 2, 4, 5), (SAMPLES, 3, 6)
CASES: dict[str, tuple[Any, tuple[int, ...], Callable[[], Tensor], Any]] = {
    "regression": (lambda: dense(1), FLAT, lambda: torch.randn(SAMPLES, 1).double(), gaussian),
    "several values": (lambda: dense(3), FLAT, lambda: torch.randn(SAMPLES, 3).double(), gaussian),
    "one logit": (lambda: dense(1), FLAT, lambda: classes(SAMPLES, 1, count=2), binary),
    "multi-label": (lambda: dense(3), FLAT, lambda: classes(SAMPLES, 3, count=2), binary),
    "segmentation": (
        lambda: convolutional(3), MAPS, lambda: classes(SAMPLES, 4, 5, count=3), on_axis(1),
    ),
    "binary segmentation": (
        lambda: convolutional(1), MAPS, lambda: classes(SAMPLES, 4, 5, count=2), binary,
    ),
    "pictures": (
        lambda: convolutional(2), MAPS, lambda: torch.randn(SAMPLES, 2, 4, 5).double(), gaussian,
    ),
    "tokens": (lambda: dense(4), TOKENS, lambda: classes(SAMPLES, 3, count=4), on_axis(2)),
    "values of tokens": (
        lambda: dense(4), TOKENS, lambda: torch.randn(SAMPLES, 3, 4).double(), gaussian,
    ),
}  # fmt: skip


def contribution(model: nn.Sequential, inputs: Tensor, labels: Tensor, loss: Any) -> Tensor:
    """mean_x (Σ a ∂L/∂a)² of what the last layer reads, sample by sample."""
    everything = model(inputs).detach()
    squares = []
    for sample, label in zip(inputs, labels, strict=True):
        activation = model[:-1](sample[None]).detach().requires_grad_()
        value = loss(model[-1](activation), label[None], everything)
        (gradient,) = torch.autograd.grad(value, activation)
        axis = -1 if isinstance(model[-1], nn.Linear) else 1
        products = (
            (activation * gradient).movedim(axis, 1).flatten(2)
            if activation.dim() > 2
            else (activation * gradient)[:, :, None]
        )
        squares.append(products[0].sum(1) ** 2)
    return torch.stack(squares).mean(0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [7, SAMPLES])
def test_contributions_are_those_of_the_likelihood(case: str, size: int) -> None:
    make, shape, label, loss = CASES[case]
    model, inputs, labels = make(), torch.randn(shape).double(), label()
    data = list(zip(inputs.split(size), labels.split(size), strict=True))
    before = fingerprint(model)
    found = profile(model, data, categories=None, progress=False)
    assert_unchanged(model, before)
    wanted = contribution(model.eval(), inputs, labels, loss)
    torch.testing.assert_close(found.contributions["taylor"]["0"][0], wanted, rtol=1e-9, atol=0)
    assert (wanted > 0).any()


def test_shuffled_batches_change_nothing_where_values_are_compared() -> None:
    model, inputs, labels = dense(3), torch.randn(SAMPLES, 6).double(), torch.rand(SAMPLES, 3)
    loaders = [
        DataLoader(TensorDataset(inputs, labels.double()), 9, shuffle=shuffle)
        for shuffle in (False, True)
    ]
    first, second = (profile(model, loader, categories=None, progress=False) for loader in loaders)
    torch.testing.assert_close(
        first.contributions["taylor"]["0"], second.contributions["taylor"]["0"]
    )


@dataclass
class Found:
    scores: Tensor
    boxes: Tensor


class TwoHeads(nn.Module):
    def __init__(self, kind: str = "tuple") -> None:
        super().__init__()
        self.kind = kind
        self.trunk = nn.Linear(6, 8)
        self.scores, self.boxes = nn.Linear(8, 5), nn.Linear(8, 4)
        with torch.no_grad():  # the first half is for the boxes alone, the second for the scores
            self.scores.weight[:, :4] = 0
            self.boxes.weight[:, 4:] = 0

    def forward(self, inputs: Tensor) -> Any:
        hidden = functional.relu(self.trunk(inputs))
        scores, boxes = self.scores(hidden), self.boxes(hidden)
        if self.kind == "tuple":
            return scores, boxes
        if self.kind == "dict":
            return {"heads": {"boxes": boxes, "scores": scores}}
        return Found(scores, boxes)


@pytest.mark.parametrize("metric", ["taylor", "deeplift"])
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_neurons_of_every_output_contribute(kind: str, metric: str) -> None:
    inputs, labels = torch.randn(SAMPLES, 6), torch.arange(SAMPLES) % 5
    data = [(inputs, labels)]
    found = profile(TwoHeads(kind), data, metrics=(metric,), categories=None, progress=False)
    assert (found.contributions[metric]["trunk"][0].abs() > 0).all()


def test_outputs_that_are_left_out_do_not_contribute() -> None:
    inputs, labels = torch.randn(SAMPLES, 6), torch.arange(SAMPLES) % 5
    for kind, spec in (("tuple", {0: "classes"}), ("tuple", lambda outputs: outputs[0])):
        found = profile(TwoHeads(kind), [(inputs, labels)], outputs=spec, progress=False)
        values = found.contributions["taylor"]["trunk"]
        assert (values[:, :4] == 0).all()
        assert (values[:, 4:] > 0).any()


def test_predicted_categories_of_any_outputs_with_classes() -> None:
    inputs = torch.randn(SAMPLES, 6)
    model = TwoHeads()
    labels = torch.arange(SAMPLES) % 5
    found = profile(model, [(inputs, labels)], categories="predicted", progress=False)
    assert sum(found.samples) == SAMPLES
    logit = dense(1)
    target = torch.arange(SAMPLES) % 2
    found = profile(logit, [(inputs.double(), target)], categories="predicted", progress=False)
    counts = torch.bincount((logit(inputs.double())[:, 0] > 0).long(), minlength=2).tolist()
    assert sorted(found.samples) == sorted(count for count in counts if count)
    with pytest.raises(DataError, match="no class is predicted"):
        profile(
            logit, [(inputs.double(), torch.rand(SAMPLES))], categories="predicted", progress=False
        )


@pytest.mark.parametrize("metric", ["taylor", "deeplift"])
def test_a_loss_of_the_users_own_needs_no_meaning(metric: str) -> None:
    """Where the loss is given, outputs may be whatever they are."""
    inputs = torch.randn(SAMPLES, 2, 4, 5).double()
    data = [(inputs, torch.randn(SAMPLES))]
    found = profile(
        convolutional(3), data, metrics=(metric,), categories=None,
        loss=lambda outputs, labels: outputs.mean((1, 2, 3)) * labels, progress=False,
    )  # fmt: skip
    assert (found.contributions[metric]["0"] != 0).any()


@pytest.mark.parametrize("spec", [None, "softmax", ["classes"]])
def test_outputs_that_do_not_say_what_they_mean_leave_the_model_alone(spec: Any) -> None:
    model, inputs = convolutional(3), torch.randn(SAMPLES, 2, 4, 5).double()
    before = fingerprint(model)
    data = [(inputs, torch.arange(SAMPLES) % 3)]
    if spec == ["classes"]:
        with pytest.raises(DataError, match="class indices are needed"):
            profile(model, data, outputs=spec, progress=False)
    else:
        with pytest.raises(ArgumentError, match="outputs='classes'"):
            profile(model, data, outputs=spec, progress=False)
    assert_unchanged(model, before)


def test_a_forward_function_is_used_for_the_data_too() -> None:
    model = dense(3)
    inputs, labels = torch.randn(SAMPLES, 6).double(), torch.arange(SAMPLES) % 3
    plain = profile(model, [(inputs, labels)], progress=False)
    wrapped = profile(
        model,
        [({"pixels": inputs, "name": "x"}, labels)],
        forward=lambda model, batch: {"scores": model(batch["pixels"])},
        keep_readers=True,
        progress=False,
    )
    assert wrapped.consumers
    torch.testing.assert_close(
        wrapped.contributions["taylor"]["0"], plain.contributions["taylor"]["0"]
    )


def test_a_loader_with_lasting_workers_is_read_once() -> None:
    model, inputs, target = dense(2), torch.randn(SAMPLES, 6).double(), torch.rand(SAMPLES, 2)
    loader = DataLoader(
        TensorDataset(inputs, target.double()), 10, num_workers=1, persistent_workers=True
    )
    found = profile(model, loader, categories=None, progress=False)
    assert found.samples == (SAMPLES,)
    described = outputs_of(model, loader)
    units = described.parts[0].variance
    assert units == pytest.approx(model(inputs).var(0).tolist())
    profile(model, loader, outputs=described, categories=None, progress=False)
