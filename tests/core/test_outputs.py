"""The output model, against naive loops over the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nss_prune.core.draws import Draws
from nss_prune.core.output_parts import Part
from nss_prune.core.outputs import LEAST_SAMPLES, Outputs, outputs_of, resolve_outputs
from nss_prune.errors import ArgumentError, DataError, NumericalError

DRAWS = 20_000
N = 12


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- formulas, each in plain loops and float64 ---------------------------------------------------


def classes(*shape: int, count: int = 5) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(shape) % count


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    return [power / sum(powers) for power in powers]


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def between_classes(whole: list[float], other: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(whole), softmax(other), strict=True))


def between_labels(whole: list[float], other: list[float]) -> float:
    total = 0.0
    for a, b in zip(whole, other, strict=True):
        p, q = sigmoid(a), sigmoid(b)
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total


def variances(rows: list[list[float]]) -> list[float]:
    found = []
    for column in zip(*rows, strict=True):
        mean = sum(column) / len(column)
        found.append(sum((value - mean) ** 2 for value in column) / (len(column) - 1))
    return found


def information(kind: str, row: list[float], units: list[float]) -> Tensor:
    """The Fisher information of one place by the definition of each distribution."""
    size = len(row)
    found = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        if kind == "classes":
            for j in range(size):
                found[i, j] = softmax(row)[i] * ((i == j) - softmax(row)[j])
        elif kind == "labels":
            found[i, i] = sigmoid(row[i]) * (1 - sigmoid(row[i]))
        else:
            found[i, i] = 1 / units[i]
    return found


# --- against the formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
def test_draws_have_the_fisher_information_as_covariance(kind: str) -> None:
    outputs = torch.randn(N, 3).double() * torch.tensor([1.0, 2.0, 0.5])
    described = resolve_outputs(kind, outputs)
    leaf = outputs.clone().requires_grad_()
    total = torch.zeros(N, 3, 3, dtype=torch.float64)
    for seed in range(DRAWS // 10):
        (drawn,) = torch.autograd.grad(described.drawn_loss(leaf, Draws(outputs, seed)), leaf)
        total += drawn[:, :, None] * drawn[:, None, :]
    units = variances(outputs.tolist())
    for sample in range(N):
        wanted = information(kind, outputs[sample].tolist(), units)
        found = total[sample] / (DRAWS // 10)
        assert (found - wanted).abs().max() < 0.08 * wanted.diagonal().max()


def test_draws_count_by_weights_positions_and_parts() -> None:
    outputs = {"a": torch.randn(N, 2, 3, 3).double(), "b": torch.randn(N, 4).double()}
    spec = {"a": ("classes", 0.25), "b": "labels"}
    described = resolve_outputs(spec, outputs)
    leaves = {key: value.clone().requires_grad_() for key, value in outputs.items()}
    squares = {key: torch.zeros_like(value) for key, value in outputs.items()}
    for seed in range(2000):
        loss = described.drawn_loss(leaves, Draws(outputs, seed))
        for key, drawn in zip(
            leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True
        ):
            squares[key] += drawn**2 / 2000
    chances = outputs["a"].softmax(1)
    wanted = 0.25 * chances * (1 - chances)
    torch.testing.assert_close(squares["a"], wanted, rtol=0.12, atol=1e-3)
    odds = outputs["b"].sigmoid()
    torch.testing.assert_close(squares["b"], odds * (1 - odds), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_float32_at_least(dtype: torch.dtype) -> None:
    outputs = torch.randn(N, 3, dtype=dtype, requires_grad=True)
    loss = resolve_outputs("classes", outputs).drawn_loss(outputs, Draws(outputs))
    assert loss.dtype == torch.float32
    assert loss.shape == ()


@pytest.mark.parametrize("kind", ["classes", "labels", "values"])
@pytest.mark.parametrize("shape", [(N, 5), (N, 7, 5), (N, 5, 2, 3)])
def test_divergence_is_that_of_the_formula(kind: str, shape: tuple[int, ...]) -> None:
    whole, other = torch.randn(2, *shape).double()
    described = resolve_outputs(kind, whole)
    found = described.divergence(whole, other)
    axis = 2 if len(shape) == 3 else 1
    rows = [tensor.movedim(axis, -1).reshape(N, -1, 5) for tensor in (whole, other)]
    units = variances(rows[0].flatten(0, 1).tolist())
    for sample in range(N):
        total = 0.0
        for a, b in zip(rows[0][sample].tolist(), rows[1][sample].tolist(), strict=True):
            if kind == "classes":
                total += between_classes(a, b)
            elif kind == "labels":
                total += between_labels(a, b)
            else:
                total += sum((x - y) ** 2 / u / 2 for x, y, u in zip(a, b, units, strict=True))
        assert float(found[sample]) == pytest.approx(total, rel=1e-10)
    assert found.shape == (N,)
    assert float(described.divergence(whole, whole).abs().max()) == 0


def test_divergence_is_half_the_information_of_a_small_change() -> None:
    """What a draw predicts and what a comparison measures are the same to second order."""
    whole = {
        "a": torch.randn(N, 4).double(),
        "b": torch.randn(N, 3).double(),
        "c": torch.randn(N, 1).double(),
    }
    spec = {"a": "classes", "b": ("labels", 2.0), "c": ("values", 0.3)}
    described = resolve_outputs(spec, whole)
    step = {key: 1e-3 * torch.randn_like(value) for key, value in whole.items()}
    measured = described.divergence(whole, {key: whole[key] + step[key] for key in whole})
    units = variances(whole["c"].tolist())
    for sample in range(N):
        predicted = 0.0
        for key, kind, weight in (("a", "classes", 1), ("b", "labels", 2), ("c", "values", 0.3)):
            matrix = information(kind, whole[key][sample].tolist(), units)
            predicted += weight * float(step[key][sample] @ matrix @ step[key][sample]) / 2
        assert float(measured[sample]) == pytest.approx(predicted, rel=1e-2)


def test_a_score_of_minus_infinity_in_both_adds_nothing() -> None:
    whole, other = torch.randn(2, N, 4).double()
    masked = [tensor.index_fill(1, torch.tensor([2]), -torch.inf) for tensor in (whole, other)]
    kept = [tensor[:, [0, 1, 3]] for tensor in (whole, other)]
    found = resolve_outputs("classes", masked[0]).divergence(*masked)
    torch.testing.assert_close(found, resolve_outputs("classes", kept[0]).divergence(*kept))


def test_losses_are_those_of_the_formula() -> None:
    scores = torch.randn(N, 3).double()
    classes = torch.randint(3, (N,))
    wanted = sum(
        -math.log(softmax(row)[c]) for row, c in zip(scores.tolist(), classes.tolist(), strict=True)
    )
    assert float(resolve_outputs(None, scores, classes).loss(scores, classes)) == pytest.approx(
        wanted
    )

    labels = torch.randint(2, (N, 3))
    wanted = 0.0
    for row, truths in zip(scores.tolist(), labels.tolist(), strict=True):
        wanted -= sum(
            math.log(sigmoid(a) if t else 1 - sigmoid(a)) for a, t in zip(row, truths, strict=True)
        )
    assert float(resolve_outputs(None, scores, labels).loss(scores, labels)) == pytest.approx(
        wanted
    )

    values = torch.randn(N, 3).double()
    units = variances(scores.tolist())
    wanted = 0.0
    for row, truth in zip(scores.tolist(), values.tolist(), strict=True):
        wanted += sum((a - t) ** 2 / u / 2 for a, t, u in zip(row, truth, units, strict=True))
    assert float(resolve_outputs(None, scores, values).loss(scores, values)) == pytest.approx(
        wanted
    )


def test_ignored_positions_have_no_loss() -> None:
    scores = torch.randn(N, 3, 4, 4).double()
    labels = torch.randint(3, (N, 4, 4))
    labels[:, 0] = -100
    described = resolve_outputs(None, scores, labels)
    (gradient,) = torch.autograd.grad(described.loss(scores.requires_grad_(), labels), scores)
    assert not gradient[:, :, 0].any()
    assert gradient[:, :, 1:].all()


# --- units ---------------------------------------------------------------------------------------


def test_units_are_over_samples_and_positions_of_all_batches() -> None:
    outputs = 5e3 + torch.randn(30, 2, 4, 4).double() * torch.tensor([3.0, 0.1])[:, None, None]
    described = resolve_outputs("values", outputs[:4]).with_variance(outputs.split(7))
    wanted = variances(outputs.movedim(1, -1).reshape(-1, 2).tolist())
    assert described.parts[0].variance == pytest.approx(wanted, rel=1e-9)


def test_units_of_what_does_not_vary_are_one() -> None:
    outputs = torch.randn(N, 3)
    outputs[:, 1] = 1 / 3
    first, constant, _ = resolve_outputs("values", outputs).parts[0].variance
    assert constant == 1
    assert first == pytest.approx(float(outputs[:, 0].var()))
    described = resolve_outputs("values", outputs[:1]).with_variance([outputs[:1]])
    assert described.parts[0].variance == (1, 1, 1)
    assert resolve_outputs("values", outputs[: LEAST_SAMPLES - 1]).parts[0].variance is None


def test_units_scale_with_the_outputs() -> None:
    """Outputs in other units (metres, millimetres) diverge by as much."""
    whole, other = torch.randn(2, N, 2).double()
    scale = torch.tensor([1e-6, 1e6]).double()
    found = resolve_outputs("values", whole).divergence(whole, other)
    scaled = resolve_outputs("values", whole * scale).divergence(whole * scale, other * scale)
    torch.testing.assert_close(found, scaled)


def test_outputs_without_weights_count_alike() -> None:
    """Losing any of them, for the average over the data, costs as much as losing the first."""
    whole = {
        "a": 0.1 * torch.randn(N, 5).double(),
        "b": torch.randn(N, 2, 4, 4).double(),
        "c": 3 * torch.randn(N, 3).double(),
        "constant": torch.ones(N, 4).double(),
    }
    spec = {"a": "classes", "b": "values", "c": "labels", "constant": "classes"}
    described = resolve_outputs(spec, whole)
    lost = {
        "a": whole["a"].softmax(1).mean(0, keepdim=True).log().expand(N, 5),
        "b": whole["b"].mean((0, 2, 3), keepdim=True).expand(N, 2, 4, 4),
        "c": torch.logit(whole["c"].sigmoid().mean(0, keepdim=True)).expand(N, 3),
    }
    costs = {
        key: float(described.divergence(whole, {**whole, key: lost[key]}).mean()) for key in lost
    }
    first = sum(
        between_classes(*rows) for rows in zip(whole["a"].tolist(), lost["a"].tolist(), strict=True)
    )
    assert costs["a"] == pytest.approx(first / N)
    assert costs["c"] == pytest.approx(costs["a"])
    assert costs["b"] == pytest.approx(costs["a"] * (N * 16 - 1) / (N * 16))  # unbiased variance
    assert described.parts[-1].weight == 1
    parts = [{key: value[i::2] for key, value in whole.items()} for i in range(2)]
    again = described.with_variance(parts)
    assert [p.weight for p in again.parts] == pytest.approx([p.weight for p in described.parts])
    given = resolve_outputs({**spec, "a": ("classes", 2.0)}, whole)
    assert [part.weight for part in given.parts] == [2, 1, 1, 1]


def test_infinite_values_have_no_unit() -> None:
    with pytest.raises(NumericalError, match="NaN or infinite"):
        resolve_outputs("values", torch.full((N, 2), torch.nan))


# --- predictions, scores, words ------------------------------------------------------------------


def test_predictions() -> None:
    scores = torch.randn(N, 5)
    boxes = torch.randn(N, 4)
    assert torch.equal(resolve_outputs("classes", scores).predictions(scores), scores.argmax(1))
    found = resolve_outputs(["values", "classes"], (boxes, scores))
    assert torch.equal(found.predictions((boxes, scores)), scores.argmax(1))
    tokens = torch.randn(N, 7, 5)
    assert torch.equal(resolve_outputs("classes", tokens).predictions(tokens), tokens.argmax(2))
    assert torch.equal(resolve_outputs("labels", scores).predictions(scores), (scores > 0).long())
    logit = torch.randn(N, 1)
    predicted = resolve_outputs("labels", logit).predictions(logit)
    assert torch.equal(predicted, (logit[:, 0] > 0).long())
    assert found.predicts
    assert not resolve_outputs("values", scores).predicts
    with pytest.raises(DataError, match="no class is predicted"):
        resolve_outputs("values", scores).predictions(scores)


def test_scores_have_the_classes_on_axis_1() -> None:
    tokens = torch.randn(N, 7, 5)
    found = resolve_outputs("classes", tokens)
    assert torch.equal(found.scores(tokens), tokens.transpose(1, 2))
    with pytest.raises(DataError, match="no class scores"):
        resolve_outputs("labels", tokens).scores(tokens)


def test_a_part_without_labels_of_its_own_has_a_loss_too() -> None:
    scores, boxes = torch.randn(N, 5).requires_grad_(), torch.randn(N, 4).requires_grad_()
    labels = classes(N)
    described = resolve_outputs(None, (scores, boxes), labels)
    described.loss((scores, boxes), labels).backward()
    centred = described.parts[1].weight * (boxes - boxes.mean(0)) / boxes.var(0)
    torch.testing.assert_close(boxes.grad, centred.detach(), rtol=1e-4, atol=1e-5)
    alone = torch.autograd.grad(
        nn.functional.cross_entropy(scores, labels, reduction="sum"), scores
    )
    torch.testing.assert_close(scores.grad, alone[0])


def test_it_says_what_it_found() -> None:
    outputs = (torch.randn(N, 5), torch.randn(N, 4))
    spec = [("classes", 1.0), ("values", 1.0)]
    assert resolve_outputs(spec, outputs).describe() == (
        "outputs: softmax over axis 1 (5 classes) of output 0; "
        "values (squared error in units of their variance) of output 1"
    )
    assert (
        resolve_outputs(("labels", 2.0), outputs[0]).describe()
        == "outputs: sigmoids (5 labels), weight 2"
    )
    assert resolve_outputs(None, outputs[0]).notes == ()
    (note,) = resolve_outputs(None, outputs[0].softmax(1)).notes
    assert "probabilities" in note


def test_a_description_by_hand() -> None:
    outputs = torch.randn(N, 4, 4, 5)
    made = Outputs((Part((), "classes", axis=-1, size=5),))
    other = Outputs((Part((), "classes", axis=3, size=5),))
    moved = outputs + torch.randn_like(outputs)
    assert torch.equal(made.divergence(outputs, moved), other.divergence(outputs, moved))
    for arguments in ({"kind": "softmax"}, {"axis": 0}, {"weight": -1.0}):
        with pytest.raises(ArgumentError):
            Part(**{"path": (), "kind": "classes", "axis": 1, "size": 5, **arguments})


# --- of a model ----------------------------------------------------------------------------------


def test_units_do_not_depend_on_the_order_of_the_data() -> None:
    model, inputs = nn.Linear(3, 2).train(), torch.randn(40, 3)
    target = torch.rand(40, 2)
    order = torch.randperm(40)
    first = outputs_of(model, [(inputs[i : i + 5], target[i : i + 5]) for i in range(0, 40, 5)])
    other = outputs_of(model, [(inputs[order], target[order])])
    assert first.parts[0].variance == pytest.approx(other.parts[0].variance)
    assert first.parts[0].variance == pytest.approx(model(inputs).var(0).tolist(), rel=1e-5)
    assert model.training


def test_a_forward_function_of_the_users_own() -> None:
    model, inputs = nn.Linear(3, 5), {"pixels": torch.randn(N, 3), "other": torch.randn(N)}
    found = outputs_of(
        model, [(inputs, classes(N))], forward=lambda model, batch: {"s": model(batch["pixels"])}
    )
    assert [(part.path, part.kind) for part in found.parts] == [(("s",), "classes")]


def test_what_is_explained_is_what_the_labels_name() -> None:
    scores = torch.randn(N + 2, 4, 3).double()
    labels = torch.randint(4, (N, 3))
    labels[0] = -100
    described = resolve_outputs(None, scores[:N], labels)
    wanted = 0.0
    for sample in range(N):
        for place in range(3):
            if labels[sample, place] != -100:
                wanted += float(scores[sample, int(labels[sample, place]), place])
    assert float(described.explained(scores, labels, N)) == pytest.approx(wanted)

    scores, labels = torch.randn(N + 1, 3).double(), torch.randint(2, (N, 3))
    labels[0], labels[1] = 0, 1
    described = resolve_outputs(None, scores[:N], labels)
    wanted = 0.0
    for row, named in zip(scores[:N].tolist(), labels.tolist(), strict=True):
        chosen = [score for score, label in zip(row, named, strict=True) if label]
        wanted += sum(chosen) if chosen else -sum(row)
    assert float(described.explained(scores, labels, N)) == pytest.approx(wanted)

    values, target = torch.randn(N, 2).double(), torch.rand(N, 2)
    units = variances(values.tolist())
    wanted = sum(v / u**0.5 for row in values.tolist() for v, u in zip(row, units, strict=True))
    described = resolve_outputs(None, values, target)
    assert float(described.explained(values, target, N)) == pytest.approx(wanted)


def test_labels_nested_otherwise_than_the_outputs_are_refused() -> None:
    outputs = {"a": torch.randn(N, 5), "b": torch.randn(N, 4)}
    described = resolve_outputs("classes", outputs)
    with pytest.raises(DataError, match="nested otherwise"):
        described.loss(outputs, {"boxes": classes(N)})
    for labels in (torch.rand(N), classes(N + 1), classes(N, 7)):
        with pytest.raises(DataError, match="class indices are needed"):
            described.loss(outputs, labels)
