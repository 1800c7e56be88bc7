"""Similarity against oracles, layers by the flow of data, and models that run without some."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from networks import assert_unchanged, batches, cnn, fingerprint, mlp, settled
from nss_prune import profile
from nss_prune.adaptation.freezing import critical_entries, train_critical
from nss_prune.deeparc import DeepArc, find_layers
from nss_prune.deeparc.connectors import Regression
from nss_prune.errors import (
    ArgumentError,
    DataError,
    ModelMismatchError,
    NothingToPruneError,
    NumericalError,
    RemovalError,
)


def hsic_1(first: Tensor, second: Tensor) -> float:
    """The unbiased estimator of HSIC, in the form of Song et al. 2012."""
    n = len(first)
    k, m = first @ first.T, second @ second.T
    k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
    ones = torch.ones(n, dtype=k.dtype)
    middle = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    last = 2 / (n - 2) * (ones @ k @ m @ ones)
    return float(((k @ m).trace() + middle - last) / (n * (n - 3)))


def minibatch_cka(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Nguyen et al. 2021, Eq. 3, over batches of outputs of two layers."""
    both = sum(hsic_1(a, b) for a, b in pairs)
    first = sum(hsic_1(a, a) for a, _ in pairs)
    second = sum(hsic_1(b, b) for _, b in pairs)
    return both / (first**0.5 * second**0.5)


def equation_2(first: Tensor, second: Tensor) -> float:
    """The paper's Eq. 1 and 2, sample by sample."""
    products, squares, other_squares = 0.0, 0.0, 0.0
    for a, b in itertools.product(range(len(first)), repeat=2):
        left, right = float(first[a] @ first[b]), float(second[a] @ second[b])
        products, squares = products + left * right, squares + left**2
        other_squares += right**2
    return products / (squares**0.5 * other_squares**0.5)


def outputs(model: nn.Sequential, last: int, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model[: last + 1](inputs).flatten(1)


@pytest.mark.parametrize(
    ("make", "shape", "ends"),
    [(mlp, (12,), (2, 4)), (cnn, (3, 12, 12), (2, 5, 8))],
)
def test_unbiased_similarity_is_minibatch_cka(
    make: Callable[[], nn.Sequential], shape: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    model, data = settled(make(), batches(16, shape, 3)[0][0]), batches(48, shape, 3)
    assert isinstance(model, nn.Sequential)
    arc = DeepArc(model, data)
    for i, j in itertools.product(range(len(ends)), repeat=2):
        pairs = [(outputs(model, ends[i], x), outputs(model, ends[j], x)) for x, _ in data]
        assert float(arc.matrix[i, j]) == pytest.approx(minibatch_cka(pairs), abs=1e-10)
    consecutive = [float(arc.matrix[i, i + 1]) for i in range(len(ends) - 1)]
    assert list(arc.similarity.values()) == consecutive


@pytest.mark.parametrize("size", [5, 16, 40])
@pytest.mark.parametrize("memory_limit", [0, 2500, 2**30])
def test_paper_similarity_is_equation_2_over_all_data_however_it_is_batched(
    size: int, memory_limit: int
) -> None:
    model, data = mlp(), batches(40, (12,), 3, size=size)
    inputs = torch.cat([x for x, _ in data])
    arc = DeepArc(model, data, similarity="paper", memory_limit=memory_limit)
    expected = equation_2(outputs(model, 2, inputs), outputs(model, 4, inputs))
    assert arc.similarity == {"3": pytest.approx(expected, abs=1e-12)}


def test_batches_too_small_for_the_unbiased_estimator_are_left_out() -> None:
    model, data = mlp(), batches(32, (12,), 3)
    extra = [*data, (torch.randn(3, 12).double(), torch.zeros(3))]
    assert torch.equal(DeepArc(model, data).matrix, DeepArc(model, extra).matrix)
    with pytest.raises(DataError, match="no batch has 4 samples"):
        DeepArc(model, batches(9, (12,), 3, size=3))


def with_identities() -> nn.Sequential:
    """Layers 3 and 5 give what they read; the others are random."""
    torch.manual_seed(0)
    widths = [(6, 8), (8, 8), (8, 8), (8, 9), (9, 3)]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in widths:
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for name in (3, 5):
            nn.init.eye_(model[name].weight)
            nn.init.zeros_(model[name].bias)
    return model


@pytest.mark.parametrize("similarity", ["unbiased", "paper"])
def test_layers_that_give_what_they_read_are_redundant(similarity: str) -> None:
    model, data = with_identities(), batches(64, (6,), 3)
    arc = DeepArc(model, data, threshold=1, similarity=similarity)  # type: ignore[arg-type]
    assert arc.layers == ("1", "3", "5", "7")
    assert arc.similarity["3"] == pytest.approx(1, abs=1e-12)
    assert arc.modules == (("1", "3", "5"), ("7",))
    assert arc.redundant == ("3", "5")
    smaller = arc.restructure()
    assert torch.equal(smaller(data[0][0]), model(data[0][0]))


def test_equal_constant_layers_are_similar_and_a_constant_one_is_to_no_other() -> None:
    model = mlp(hidden=(8, 8, 8))
    with torch.no_grad():
        for name in (3, 5):
            model[name].weight.zero_()
            model[name].bias.fill_(1)
    matrix = DeepArc(model, batches(32, (12,), 3)).matrix
    assert matrix[0].tolist() == [1, 0, 0]
    assert matrix[1].tolist() == [0, 1, 1]


def test_a_layer_takes_in_the_norm_and_activation_that_follow_it_and_no_pool() -> None:
    layers = find_layers(cnn(), torch.randn(2, 3, 12, 12).double())
    assert [layer.parts for layer in layers] == [("0", "1", "2"), ("4", "5"), ("7", "8")]
    assert [layer.input_shape for layer in layers] == [(3, 12, 12), (8, 6, 6), (160,)]
    assert [layer.output_shape for layer in layers] == [(8, 12, 12), (10, 4, 4), (14,)]


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "resnet18": (
        torchvision.models.resnet18,
        (3, 32, 32),
        ["conv1", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))],
    ),
    "timm resnet18": (
        lambda: timm.create_model("resnet18"),
        (3, 32, 32),
        ["conv1", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))],
    ),
    "mobilenet_v2, blocks without a shortcut too": (
        torchvision.models.mobilenet_v2,
        (3, 32, 32),
        ["features.0.0", *(f"features.{i}" for i in range(1, 18)), "features.18.0"],
    ),
    "vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3),
        (3, 32, 32),
        ["patch_embed.proj", "blocks.0", "blocks.1", "blocks.2"],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_what_no_path_passes_by(name: str) -> None:
    make, shape, expected = BLOCKS[name]
    layers = find_layers(make(), torch.randn(2, *shape))
    assert [layer.name for layer in layers] == expected


def test_layers_of_a_model_that_reads_integers() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 2))
    layers = find_layers(model, torch.randint(0, 9, (2, 4)))
    assert [layer.name for layer in layers] == ["0", "2"]


@pytest.mark.parametrize("similarity", ["unbiased", "paper"])
def test_what_works_in_place_after_a_layer_does_not_change_what_is_compared(
    similarity: str,
) -> None:
    class Network(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.head = nn.Linear(5, 2)
            self.in_place = in_place

        def forward(self, inputs: Tensor) -> Tensor:
            for layer in (self.first, self.second):
                inputs = torch.nn.functional.relu(layer(inputs), inplace=self.in_place)
            return self.head(inputs)

    data = [(x.float(), y) for x, y in batches(32, (5,), 2)]
    arcs = [DeepArc(Network(mode), data, similarity=similarity) for mode in (True, False)]  # type: ignore[arg-type]
    assert torch.equal(arcs[0].matrix, arcs[1].matrix)


def resnet_with_identities() -> nn.Module:
    """A resnet18 of which the second block of every stage adds nothing."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4).double()
    settled(model, torch.randn(8, 3, 32, 32).double())
    with torch.no_grad():
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            stage[1].bn2.weight.zero_()
            stage[1].bn2.bias.zero_()
    return model


def test_blocks_that_add_nothing_can_go_and_the_output_stays() -> None:
    model, data = resnet_with_identities(), batches(16, (3, 32, 32), 4, size=8)
    before = fingerprint(model)
    arc = DeepArc(model, data, threshold=1)
    assert arc.redundant == tuple(f"layer{i}.1" for i in range(1, 5))
    smaller = arc.restructure()
    assert_unchanged(model, before)
    assert torch.equal(smaller(data[0][0]), model(data[0][0]))
    assert parameters(smaller) == pytest.approx(arc.share * parameters(model))
    assert arc.restructure(inplace=True) is model
    assert torch.equal(smaller(data[0][0]), model(data[0][0]))
    assert parameters(smaller) == parameters(model)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_without_all_blocks_but_the_first_a_model_still_runs_and_trains(name: str) -> None:
    make, shape, expected = BLOCKS[name]
    torch.manual_seed(0)
    data = [(torch.randn(8, *shape), torch.arange(8))]
    model = settled(make(), data[0][0])
    arc = DeepArc(model, data, layers=expected[1:])
    arc.matrix = torch.ones_like(arc.matrix)  # as if all were alike
    assert arc.redundant == tuple(expected[2:])
    smaller = arc.restructure()
    assert parameters(smaller) < parameters(model)
    smaller.train()
    scores = smaller(data[0][0])
    assert scores.shape == model(data[0][0]).shape
    nn.functional.cross_entropy(scores, data[0][1]).backward()
    assert all(p.grad is not None for p in smaller.parameters())


def test_regression_is_least_squares() -> None:
    torch.manual_seed(0)
    read, made = torch.randn(60, 7).double() + 3, torch.randn(60, 4).double()
    regression = Regression()
    for rows in (slice(0, 25), slice(25, 60)):
        regression.add(read[rows], made[rows])
    weight, bias = regression.solve("layer")
    with_ones = torch.cat([read, torch.ones(60, 1).double()], dim=1)
    best = torch.linalg.lstsq(with_ones, made).solution
    torch.testing.assert_close(
        torch.cat([weight, bias[:, None]], dim=1).T, best, rtol=1e-3, atol=1e-4
    )


def test_a_linear_layer_is_replaced_by_a_linear_layer_that_does_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 3)).double()
    data = batches(80, (6,), 3)
    arc = DeepArc(model, data, threshold=0.01)
    smaller = arc.restructure()
    assert arc.redundant == ("1",)
    assert isinstance(smaller, nn.Sequential)
    assert smaller[1] is not model[1]
    torch.testing.assert_close(smaller(data[0][0]), model(data[0][0]), rtol=1e-3, atol=1e-3)


def test_a_strided_convolution_is_replaced_by_a_1_x_1_convolution_that_does_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(5, 6, 1, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 3),
    ).double()
    data = batches(40, (3, 7, 7), 3)
    smaller = DeepArc(model, data, threshold=0.01).restructure()
    assert isinstance(smaller, nn.Sequential)
    assert smaller[1].stride == (2, 2)
    torch.testing.assert_close(smaller(data[0][0]), model(data[0][0]), rtol=1e-3, atol=1e-3)


def test_a_connector_fits_what_is_left_before_it() -> None:
    """Of three redundant layers in a row the last is fitted to what the others now give."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 6), nn.Linear(6, 2))
    data = batches(60, (8,), 2)
    smaller = DeepArc(model.double(), data, layers=["0", "1", "2"], threshold=0.01).restructure()
    assert isinstance(smaller, nn.Sequential)
    assert isinstance(smaller[1], nn.Identity)
    torch.testing.assert_close(smaller(data[0][0]), model(data[0][0]), rtol=1e-3, atol=1e-3)


def test_a_convolution_without_padding_is_replaced_by_one_that_crops() -> None:
    model, data = cnn(), batches(32, (3, 12, 12), 5)
    settled(model, data[0][0])
    arc = DeepArc(model, data, layers=["0", "4", "7"])
    arc.matrix = torch.ones_like(arc.matrix)  # as if all were alike
    smaller = arc.restructure()
    assert [type(smaller[i]) for i in (5, 8)] == [nn.Identity, nn.Identity]  # type: ignore[index]
    assert smaller(data[0][0]).shape == (16, 5)


def test_connectors_keep_type_mode_and_trainability() -> None:
    model = mlp(hidden=(16, 11)).to(torch.bfloat16).train()
    data = [(x.bfloat16(), y) for x, y in batches(32, (12,), 3)]
    smaller = DeepArc(model, data, threshold=0.001).restructure()
    assert all(module.training for module in smaller.modules())
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in smaller.parameters())


def test_without_redundant_layers_the_model_stays() -> None:
    model, data = mlp(), batches(32, (12,), 3)
    arc = DeepArc(model, data, threshold=1)
    assert arc.redundant == ()
    assert arc.share == 1
    smaller = arc.restructure()
    assert smaller is not model
    assert_unchanged(smaller, fingerprint(model) | {"objects": fingerprint(smaller)["objects"]})


class ReadsALayer(nn.Module):
    """Fails without its second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs))) * self.second.out_features


class Upsamples(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.ConvTranspose2d(4, 4, 2, stride=2),
            nn.Flatten(),
            nn.Linear(4 * 64, 2),
        )


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [(ReadsALayer, (6,), "does not run"), (Upsamples, (3, 6, 6), "1 x 1 convolution")],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_removal_that_fails_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module], shape: tuple[int, ...], message: str, inplace: bool
) -> None:
    model, data = make().double().train(), batches(32, shape, 2)
    arc = DeepArc(model, data, threshold=0.001)
    assert len(arc.redundant) == 1
    before = fingerprint(model)
    with pytest.raises(RemovalError, match=message):
        arc.restructure(inplace=inplace)
    assert_unchanged(model, before)


def test_data_that_ends_is_asked_for_again_where_a_layer_gets_a_connector() -> None:
    model, data = mlp(), batches(32, (12,), 3)
    before = fingerprint(model)
    arc = DeepArc(model, iter(data), threshold=0.001)
    with pytest.raises(DataError, match="iterated only once"):
        arc.restructure()
    with pytest.raises(DataError, match="no batches"):
        arc.restructure([], inplace=True)
    assert_unchanged(model, before)
    assert arc.restructure(data)(data[0][0]).shape == (16, 3)


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan"), "0.9", None, True])
def test_thresholds_outside_the_range_are_refused(threshold: object) -> None:
    data = batches(16, (12,), 3)
    with pytest.raises(ArgumentError, match="threshold is"):
        DeepArc(mlp(), data, threshold=threshold)  # type: ignore[arg-type]
    arc = DeepArc(mlp(), data)
    with pytest.raises(ArgumentError, match="threshold is"):
        arc.threshold = threshold  # type: ignore[assignment]
    assert arc.threshold == 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity": "cosine"}, "similarity is 'cosine'"),
        ({"memory_limit": -1}, "memory_limit is -1"),
        ({"layers": ["1", "nowhere"]}, "'nowhere', which the model does not have"),
        ({"layers": ["1", "2"]}, "a layer has parameters"),
        ({"layers": ["1", ""]}, "'1' and '', which contains it"),
        ({"layers": "1"}, "give a list"),
    ],
)
def test_other_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        DeepArc(mlp(), batches(16, (12,), 3), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("similarity", ["unbiased", "paper"])
def test_bad_data_is_refused_and_leaves_no_trace(similarity: str) -> None:
    model = mlp().train()
    before = fingerprint(model)
    good, bad = batches(16, (12,), 3), batches(16, (12,), 3)
    bad[0][0][3, 2] = torch.nan
    for data, kind, message in (
        ([], DataError, "no batches"),
        ([(torch.zeros(0, 12).double(), torch.zeros(0))], DataError, "no samples"),
        (batches(16, (7,), 3), DataError, "refuses batch 0"),
        ([*good, *batches(16, (7,), 3)], DataError, "refuses batch 1"),
        ([*good, *bad], NumericalError, "1 gives NaN or infinite values in batch 1"),
    ):
        with pytest.raises(kind, match=message):
            DeepArc(model, data, similarity=similarity)  # type: ignore[arg-type]
        assert_unchanged(model, dict(before))


def test_a_layer_whose_first_axis_is_not_the_samples_is_refused() -> None:
    model = nn.Sequential(
        nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.Linear(3, 4), nn.Linear(4, 2)
    ).double()
    data = batches(16, (6,), 2)
    with pytest.raises(DataError, match="3 gives .32, 4. for 16 samples"):
        DeepArc(model, data, layers=["0", "3"])
    with pytest.raises(NothingToPruneError):
        DeepArc(model, data)


def test_a_model_of_one_layer_has_nothing_to_compare() -> None:
    with pytest.raises(NothingToPruneError, match="where two are needed"):
        DeepArc(mlp(hidden=(8,)), batches(16, (12,), 3))


def test_layers_that_are_not_redundant_train() -> None:
    model = with_identities()
    arc = DeepArc(model, batches(64, (6,), 3), threshold=1)
    trainable = arc.trainable()
    parameters = dict(model.named_parameters())
    assert {name: mask.shape for name, mask in trainable.items()} == {
        name: value.shape for name, value in parameters.items()
    }
    frozen = {name for name, mask in trainable.items() if not mask.any()}
    assert frozen == {"3.weight", "3.bias", "5.weight", "5.bias"}
    assert all(mask.all() for name, mask in trainable.items() if name not in frozen)
    redundant = sum(parameters[name].numel() for name in frozen)
    assert arc.share == 1 - redundant / sum(value.numel() for value in parameters.values())
    assert arc.freezing().share == arc.share


def test_weights_shared_with_a_layer_that_is_not_redundant_train() -> None:
    model = with_identities()
    model[3].weight = model[5].weight
    arc = DeepArc(model, batches(64, (6,), 3), layers=["1", "3"], threshold=1)
    assert arc.redundant == ("3",)
    assert arc.trainable()["3.weight"].all()
    assert not arc.trainable()["3.bias"].any()


def test_with_a_slice_only_critical_entries_of_layers_that_are_not_redundant_train() -> None:
    model, data = with_identities(), batches(64, (6,), 3)
    arc = DeepArc(model, data, threshold=1)
    critical = profile(model, data).slice(0.8)
    assert 0 < critical.compression_rate(model) < 1
    entries, layers = critical_entries(critical, model), arc.trainable()
    both = arc.trainable(critical)
    assert all(torch.equal(both[name], entries[name] & layers[name]) for name in both)
    share = arc.freezing(critical).share
    assert share < min(arc.share, train_critical(critical, model).share)


@pytest.mark.parametrize("with_slice", [True, False])
def test_what_does_not_train_keeps_its_bits_and_statistics(with_slice: bool) -> None:
    model, data = resnet_with_identities(), batches(16, (3, 32, 32), 4, size=8)
    arc = DeepArc(model, data, threshold=1)
    critical = profile(model, data).slice(ratio=0.5, strategy="global") if with_slice else None
    freezing = arc.freezing(critical)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    with freezing.attach(optimizer):
        for inputs, labels in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    trainable = arc.trainable(critical)
    for name, parameter in model.named_parameters():
        moved = parameter != before[name]
        assert not moved[~trainable[name]].any()
        assert moved.any() or not trainable[name].any()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            is_redundant = any(name.startswith(f"{layer}.") for layer in arc.redundant)
            assert torch.equal(buffer, before[name]) == is_redundant


def test_a_model_that_has_changed_is_refused() -> None:
    model, data = with_identities(), batches(64, (6,), 3)
    arc = DeepArc(model, data, threshold=1)
    arc.model = mlp(hidden=())
    for method in (arc.trainable, arc.restructure):
        with pytest.raises(ModelMismatchError, match="no layer"):
            method()
