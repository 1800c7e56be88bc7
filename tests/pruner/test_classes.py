"""A model for some of its classes, against the whole model restricted to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from networks import assert_unchanged, fingerprint, mlp
from nss_prune import NSSPruner, Views, load_pruned, profile, save_pruned
from nss_prune.core.views import views_of
from nss_prune.errors import ArgumentError, DataError
from nss_prune.pruner.class_samples import of_classes

CLASSES = [4, 1, 5]
LEFT = {"theta": 0.7}


class Convolutional(nn.Module):
    """Class scores by a convolution of one position, and the number of classes as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 7
        self.stem = nn.Conv2d(2, 9, 3)
        self.head = nn.Conv2d(9, 7, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu()).mean((2, 3))


def whole_numbers(model: nn.Module) -> nn.Module:
    """Small whole numbers for weights, so that no sum rounds whatever its order."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape))
    return model.double().eval()


def made(kind: str, samples: int = 210) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    model = whole_numbers(mlp(12, (16, 11), 7) if kind == "mlp" else Convolutional())
    shape = (12,) if kind == "mlp" else (2, 5, 5)
    inputs = torch.randint(-4, 5, (samples, *shape)).double()
    labels = torch.arange(samples) % 7
    return model, list(zip(inputs.split(70), labels.split(70), strict=True))


@pytest.mark.parametrize("keep_head", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "convolution"])
def test_their_scores_are_those_of_the_masked_model_bit_for_bit(kind, keep_head) -> None:
    model, data = made(kind)
    inputs = data[0][0]
    pruner = NSSPruner(
        model, inputs[:2], data=data, fold=False, classes=CLASSES, keep_head=keep_head, **LEFT
    )
    before = fingerprint(model)
    with pruner.slice.masked(copy.deepcopy(model)) as masked, torch.no_grad():
        wanted = masked(inputs)
    assert_unchanged(model, before)
    pruner.step()
    assert pruner.report.after.parameters < pruner.report.before.parameters
    with torch.no_grad():
        got = model(inputs)
    outputs = pruner.report.classes
    assert list(outputs) == CLASSES
    assert list(outputs.values()) == (CLASSES if keep_head else [0, 1, 2])
    assert got.shape[1] == (7 if keep_head else 3)
    for kept, output in outputs.items():
        assert torch.equal(got[:, output], wanted[:, kept])
    row = pruner.report.rows[-1]
    assert (row.before, row.after) == (7, 7 if keep_head else 3)
    assert any(f"4 -> {outputs[4]}, 1 -> {outputs[1]}" in note for note in pruner.report.notes)


def test_the_slice_is_the_union_of_these_categories_alone() -> None:
    """θ on their samples, with a loss over their outputs: that of a model with no other rows."""
    model, data = made("mlp")
    mine = NSSPruner(model, data[0][0][:2], data=data, classes=CLASSES, **LEFT).slice
    narrow = copy.deepcopy(model)
    narrow[5].weight = nn.Parameter(model[5].weight.detach()[CLASSES])
    narrow[5].bias = nn.Parameter(model[5].bias.detach()[CLASSES])
    position = {one: place for place, one in enumerate(CLASSES)}
    inputs = torch.cat([x for x, _ in data])
    labels = torch.cat([y for _, y in data]).tolist()
    rows = [row for row, label in enumerate(labels) if label in position]
    own = [(inputs[rows], torch.tensor([position[labels[row]] for row in rows]))]
    known = profile(narrow, own, inputs[:2])
    assert set(known.categories) == {(0,), (1,), (2,)}
    expected = known.slice(0.7).kept
    assert all(torch.equal(mine.kept[name], expected[name]) for name in expected)


@pytest.mark.parametrize("samples", [420, 210])
def test_the_divergence_is_over_these_outputs_and_samples(samples: int) -> None:
    """Over all samples where fewer than a hundred are of the classes."""
    model, data = made("mlp", samples)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    pruner = NSSPruner(model, data[0][0][:2], data=data, classes=[4, 1], macs_budget=0.6)
    narrow = copy.deepcopy(model)
    narrow[5].weight = nn.Parameter(model[5].weight.detach()[[4, 1]])
    narrow[5].bias = nn.Parameter(model[5].bias.detach()[[4, 1]])
    own = [(x[(y == 4) | (y == 1)], None) for x, y in data]
    seen = own if samples == 420 else [(x, None) for x, _ in data]
    other = NSSPruner(narrow, data[0][0][:2], data=seen, macs_budget=0.6, outputs="classes")
    for name, found in other.evidence.eliminations.items():
        mine = pruner.evidence.eliminations[name]
        assert torch.equal(mine.order, found.order)
        torch.testing.assert_close(mine.divergence, found.divergence)
    pruner.step()
    few = any("all samples calibrate, since fewer than 100" in note for note in pruner.report.notes)
    assert few == (samples == 210)
    assert pruner.report.after.macs <= 0.6 * pruner.report.before.macs
    assert pruner.report.after.macs > 0.5 * pruner.report.before.macs  # the head's rows count


@pytest.mark.parametrize("how", ["views", "once", "labels"])
def test_all_samples_join_where_they_can(how: str) -> None:
    model, data = made("mlp")
    given = {"views": Views(data, lambda x: -x), "once": iter(data), "labels": data}[how]
    rule = {"strategy": "semantic"} if how == "labels" else {}
    pruner = NSSPruner(
        model, data[0][0][:2], data=given, classes=[4, 1], macs_budget=0.6, fold=False, **rule
    )
    pruner.step()
    joined = any("all samples calibrate" in note for note in pruner.report.notes)
    assert joined == (how == "views")


@pytest.mark.parametrize("extra", [
    {"macs_budget": 0.5, "balance": True}, {"theta": 0.9, "iterative_steps": 2},
    {"max_divergence": 0.05}, {"macs_budget": 0.5, "fold": "refit", "keep_head": True},
    {"pruning_ratio": 0.3},
])  # fmt: skip
def test_it_goes_with_the_other_arguments(extra) -> None:
    model, data = made("mlp")
    pruner = NSSPruner(model, data[0][0][:2], data=data, classes=CLASSES, **extra)
    for _ in range(pruner.iterative_steps):
        pruner.step()
        assert pruner.report.classes[5] == (5 if "keep_head" in extra else 2)
    assert model(data[0][0]).shape[1] == (7 if "keep_head" in extra else 3)


def test_a_file_keeps_which_class_each_output_is(tmp_path) -> None:
    model, data = made("convolution")
    fresh = copy.deepcopy(model)
    NSSPruner(model, data[0][0][:2], data=data, classes=CLASSES, **LEFT).step()
    assert model.num_classes == model.head.out_channels == 3
    save_pruned(model, tmp_path / "model.safetensors")
    loaded = load_pruned(tmp_path / "model.safetensors", fresh)
    assert loaded.head.kept_classes == model.head.kept_classes == tuple(CLASSES)
    assert loaded.num_classes == 3
    assert torch.equal(loaded(data[0][0]), model(data[0][0]))


def test_labels_are_positions_among_the_classes() -> None:
    inputs = torch.arange(12).double()[:, None]
    labels = torch.arange(6)
    data = [(inputs[:6], labels), (inputs[6:], labels), (inputs[:1], labels[:1])]
    found = list(of_classes(data, [4, 1]))
    assert [x.flatten().tolist() for x, _ in found] == [[1, 4], [7, 10]]
    assert [y.tolist() for _, y in found] == [[1, 0], [1, 0]]
    once = of_classes(iter(data), [4, 1])
    assert next(once)[1].tolist() == [1, 0]
    rows = torch.eye(6)[[0, 1, 4]]
    rows[2, 1] = 1
    ((x, y),) = of_classes([(inputs[:3], rows)], [4, 1])
    assert x.flatten().tolist() == [1, 2]
    assert y.tolist() == [[0, 1], [1, 1]]
    views = of_classes(Views(data, lambda x: -x), [4, 1])
    assert views_of(views) == 2
    assert next(iter(views))[0].flatten().tolist() == [1, -1, 4, -4]


@pytest.mark.parametrize(("labels", "message"), [
    (None, "labels of a batch"), (torch.zeros(6), "one class for each"),
    (torch.zeros(6, dtype=torch.long), "no sample"),
])  # fmt: skip
def test_labels_that_name_no_class(labels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(of_classes([(torch.zeros(6, 2), labels)], [4, 1]))


class LogSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(12, (16, 11), 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).log_softmax(1)


def known_profile() -> object:
    model, data = made("mlp")
    return profile(model, data, data[0][0][:2])


CONTRADICTIONS = {
    "no data": ("give data=", {"data": None}),
    "keep_head alone": ("goes with classes", {"classes": None, "keep_head": True}),
    "one class": ("at least two", {"classes": [3]}),
    "twice": ("each once", {"classes": [3, 3]}),
    "no numbers": ("numbers of the classes", {"classes": ["cat", "dog"]}),
    "beyond": ("0 to 6", {"classes": [3, 7]}),
    "all": ("fewer than all", {"classes": range(7)}),
    "outputs": ("outputs= is about all", {"outputs": "classes"}),
    "loss": ("loss= is about all", {"loss": len}),
    "categories": ("categories= is about all", {"categories": "predicted"}),
    "profile": ("profile= is about all", {"profile": True}),
    "head": ("keep_head=True", {"model": LogSoftmax}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_arguments_that_contradict_each_other(case: str) -> None:
    message, arguments = CONTRADICTIONS[case]
    model, data = made("mlp")
    arguments = {"data": data, "classes": CLASSES, **arguments}
    model = arguments.pop("model", lambda: model)()
    if arguments.get("profile"):
        arguments["profile"] = known_profile()
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=message):
        NSSPruner(model, data[0][0][:2], **arguments)
    assert_unchanged(model, before)


def test_an_error_leaves_the_head_alone(monkeypatch) -> None:
    model, data = made("mlp")
    pruner = NSSPruner(model, data[0][0][:2], data=data, classes=CLASSES, **LEFT)
    before = fingerprint(model)

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("nss_prune.pruner.subject.remove", fails)
    with pytest.raises(Exception, match="broken"):
        pruner.step()
    assert_unchanged(model, before)
