"""Folding is exact where it can be, the best linear guess elsewhere, and never a step back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from networks import (
    Residual,
    Tied,
    assert_unchanged,
    batches,
    cnn,
    fingerprint,
    hand_weighted,
    mlp,
    settled,
)
from nss_prune import NSSPruner, Slice, remove
from nss_prune.compensation.folding import Folded, fold, folding
from nss_prune.compensation.refit import refit
from nss_prune.compensation.ridge import ridge
from nss_prune.core.undo import undone_on_error
from nss_prune.discovery.whole import discover
from nss_prune.errors import (
    ArgumentError,
    DataError,
    ModelMismatchError,
    NumericalError,
    RemovalError,
)
from nss_prune.graph.axes import map_positions, sides_by_consumer
from nss_prune.graph.neurons import Member, NeuronGroup
from nss_prune.statistics.consumers import consumer_statistics

Data = list[tuple[Tensor, Tensor]]


def slice_without(groups: tuple[NeuronGroup, ...], removed: dict[str, list[int]]) -> Slice:
    kept = {}
    for group in groups:
        kept[group.name] = torch.ones(group.size, dtype=torch.bool)
        kept[group.name][removed.get(group.name, [])] = False
    return Slice(kept, groups)


def random_slice(groups: tuple[NeuronGroup, ...], share: float = 0.6, seed: int = 1) -> Slice:
    generator = torch.Generator().manual_seed(seed)
    kept = {group.name: torch.rand(group.size, generator=generator) < share for group in groups}
    for mask in kept.values():
        mask[0] = True
    return Slice(kept, groups)


@contextlib.contextmanager
def torch_default_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def combine(layer: nn.Module, removed: int, axis: int = 0, constant: float = 0.0) -> None:
    """Make one output of a layer 0.5 times output 0 minus 2 times output 1, plus a constant."""
    with torch.no_grad():
        for parameter in layer.parameters():
            axis_here = axis if parameter.dim() > 1 else 0
            rows = parameter.movedim(axis_here, 0)
            rows[removed] = 0.5 * rows[0] - 2 * rows[1]
        layer.bias[removed] += constant


def outputs(model: nn.Module, data: Data) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(inputs) for inputs, _ in data])


def gone_by_error(
    model: nn.Module, data: Data, removed: dict[str, list[int]]
) -> tuple[float, Folded]:
    """Largest error of the outputs after folding and removing, on the scale of the outputs."""
    groups = discover(model, data[0][0][:2]).groups
    critical = slice_without(groups, removed)
    whole = outputs(model, data)
    with critical.masked(model):
        masked = outputs(model, data)
    assert (whole - masked).abs().max() > 1e-3 * whole.abs().max()  # something to fold
    folded = fold(model, critical, consumer_statistics(model, data, groups))
    remove(model, critical, data[0][0][:2])
    return float((outputs(model, data) - whole).abs().max() / whole.abs().max()), folded


class Deconvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 6, 1)
        self.second = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, groups=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(self.first(inputs)).relu())


class Joined(nn.Module):
    """One layer reads what two others make."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(8, 5, 1)
        self.right = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(5 + 6, 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(inputs), self.right(inputs)], dim=1))


def two_convolutions(**arguments: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, **arguments), nn.Flatten(2))  # type: ignore[arg-type]


EXACT: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...], int]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), "0", (8,), 4),
    "convolution with stride": (
        lambda: two_convolutions(kernel_size=3, stride=2), "0", (8, 9, 9), 4,
    ),
    "convolution with dilation": (
        lambda: two_convolutions(kernel_size=3, dilation=2), "0", (8, 9, 9), 4,
    ),
    "convolution with circular padding": (
        lambda: two_convolutions(kernel_size=3, padding=1, padding_mode="circular"),
        "0", (8, 6, 6), 4,
    ),
    "flattened map": (
        lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 9, 3)),
        "0", (8, 3, 3), 4,
    ),
    "joined, the first": (Joined, "left", (8, 4, 4), 4),
    "joined, the second": (Joined, "right", (8, 4, 4), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_linear_combination_of_others_folds_exactly(name: str) -> None:
    make, layer, shape, neuron = EXACT[name]
    torch.manual_seed(0)
    model = make().double()
    combine(model.get_submodule(layer), neuron, constant=0.7)
    error, folded = gone_by_error(model, batches(160, shape, 2), {layer: [neuron]})
    assert error < 1e-9
    assert not folded.notes
    assert all(after < 1e-15 for _, after in folded.errors.values())


@pytest.mark.parametrize(
    "make", [lambda: two_convolutions(kernel_size=3, padding=1), Deconvolution]
)
def test_without_a_constant_padding_and_transposition_fold_exactly(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = make().double()
    layer = "0" if isinstance(model, nn.Sequential) else "first"
    combine(model.get_submodule(layer), 4)
    error, _ = gone_by_error(model, batches(160, (8, 6, 6), 2), {layer: [4]})
    assert error < 1e-9


def test_constant_under_zero_padding_is_off_at_the_border_as_the_error_says() -> None:
    torch.manual_seed(0)
    model = two_convolutions(kernel_size=3, padding=1).double()
    combine(model[0], 4, constant=0.7)
    data = batches(160, (8, 8, 8), 2)
    whole = outputs(model, data)
    reference = copy.deepcopy(model[1])
    reference.bias = None
    with torch.no_grad():  # what the constant gives at each position, less its average
        constant = torch.zeros(1, 6, 8, 8, dtype=torch.float64)
        constant[:, 4] = 0.7
        border = reference(constant).flatten(2)
        border -= border.mean(2, keepdim=True)
    _, folded = gone_by_error(model, data, {"0": [4]})
    missing = whole - outputs(model, data)
    assert (missing - border).abs().max() < 1e-9
    before, after = folded.errors["1"]
    assert 0 < after < before


def test_grouped_convolution_folds_within_its_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(2)
    ).double()
    with torch.no_grad():  # neuron 3 is channels 3 and 7: each from its own half
        weight = model[0].weight
        weight[3] = weight[0] + weight[1] - weight[2]
        weight[7] = 3 * weight[5]
    error, folded = gone_by_error(model, batches(160, (3, 6, 6), 2), {"0": [3]})
    assert error < 1e-9
    assert not folded.notes


def test_channels_of_other_groups_do_not_help_a_grouped_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(12, 8, 1, bias=False), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(2)
    ).double()
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[4]  # which the other half reads
    error, _ = gone_by_error(model, batches(160, (12, 6, 6), 2), {"0": [3]})
    assert error > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_constant_neuron_folds_into_the_bias_alone(bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.5
    data = batches(64, (5,), 2)
    groups = discover(model, data[0][0]).groups
    statistics = consumer_statistics(model, data, groups)
    before, whole = model[2].weight.detach().clone(), outputs(model, data)
    offset = model[2].bias.detach().clone() if bias else 0
    critical = slice_without(groups, {"0": [2]})
    folded = fold(model, critical, statistics)
    assert torch.equal(model[2].weight, before)
    torch.testing.assert_close(model[2].bias - offset, 1.5 * before[:, 2], rtol=1e-12, atol=0)
    assert not folded.notes
    assert folded.errors["2"][1] < 1e-15
    remove(model, critical, data[0][0])
    assert (outputs(model, data) - whole).abs().max() < 1e-12


def test_paper_example_folds_the_sum_of_two_neurons() -> None:
    """Neuron 2 is the sum of 0 and 1; class 0 reads u + 2 (u + v), class 1 reads v."""
    model = hand_weighted()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.rand(64, 2, dtype=torch.float64, generator=generator), torch.zeros(64))]
    groups = discover(model, data[0][0]).groups
    fold(model, slice_without(groups, {"0": [2]}), consumer_statistics(model, data, groups))
    wanted = torch.tensor([[3.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(model[2].weight[:, :2].detach(), wanted, rtol=1e-9, atol=1e-9)
    assert model[2].bias.abs().max() < 1e-9


def naive_ridge(
    design: Tensor, wanted: Tensor, weight: Tensor, penalties: Tensor
) -> tuple[Tensor, float]:
    """Generalised cross-validation by its definition: with the hat matrix of each penalty."""
    rows = len(design)
    best = (torch.inf, torch.zeros(0), 0.0)
    for penalty in penalties:
        inverse = torch.linalg.inv(design.T @ design / rows + penalty * torch.eye(design.shape[1]))
        hat = design @ inverse @ design.T / rows
        error = float(((wanted - hat @ wanted) @ weight.T).square().sum(1).mean())
        score = error / (1 - (float(hat.trace()) + 1) / rows) ** 2
        if score < best[0]:
            best = (score, wanted.T @ design @ inverse / rows, error)
    return best[1], best[2]


def test_ridge_is_generalised_cross_validation_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 80
    design = torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    wanted = design @ torch.randn(6, 4, dtype=torch.float64, generator=generator)
    wanted += 2 * torch.randn(rows, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    design, wanted = design - design.mean(0), wanted - wanted.mean(0)
    known = design.T @ design / rows
    found = ridge(
        missing=wanted.T @ wanted / rows,
        cross=wanted.T @ design / rows,
        known=known,
        gram=weight.T @ weight,
        floor=1e-12,
        observations=rows,
    )
    assert found is not None
    largest = float(torch.linalg.eigvalsh(known)[-1])
    decades = torch.log10(torch.tensor(largest / 1e-12)).item()
    penalties = largest * 10 ** -torch.linspace(decades, 0, int(4 * decades) + 1).double()
    with torch_default_double():
        solution, error = naive_ridge(design, wanted, weight, penalties)
    torch.testing.assert_close(found[0], solution, rtol=0, atol=1e-5)
    assert found[1] == pytest.approx(error, rel=1e-5)


def test_equals_least_squares_where_data_abounds() -> None:
    torch.manual_seed(0)
    model = mlp(12, (10, 8), 3)
    data = batches(20_000, (12,), 2, size=5_000)
    groups = discover(model, data[0][0][:2]).groups
    critical = slice_without(groups, {"3": [1, 4, 6]})
    kept = critical.kept["3"]
    old, offset = model[5].weight.detach().clone(), model[5].bias.detach().clone()
    read = torch.cat([model[:5](inputs) for inputs, _ in data]).detach()
    ones = torch.ones(len(read), 1, dtype=torch.float64)
    wanted = read @ old.T
    design = torch.cat([read[:, kept], ones], dim=1)
    best = torch.linalg.lstsq(design, wanted).solution
    folded = fold(model, critical, consumer_statistics(model, data, groups))
    found = torch.cat([model[5].weight[:, kept].T, (model[5].bias - offset)[None]]).detach()
    power = wanted.square().sum(1).mean()
    distance = (design @ (found - best)).square().sum(1).mean() / power
    residual = (design @ best - wanted).square().sum(1).mean() / power
    assert distance < 1e-3 * residual  # ridge against plain least squares, on the same data
    assert folded.errors["5"][1] == pytest.approx(float(residual), rel=1e-3)


def test_errors_are_those_on_the_calibration_data() -> None:
    torch.manual_seed(0)
    model = mlp(12, (16, 11), 3)
    data = batches(400, (12,), 2, size=37)
    groups = discover(model, data[0][0][:2]).groups
    critical = random_slice(groups)
    statistics = consumer_statistics(model, data, groups)
    read = torch.cat([model[:5](inputs) for inputs, _ in data]).detach()
    whole, offset = model[5](read).detach(), model[5].bias.detach().clone()
    with critical.masked(model):
        plain = model[5](read).detach()
    folded = fold(model, critical, statistics)
    with critical.masked(model):
        after = model[5](read).detach()
    power = (whole - offset).square().sum(1).mean()
    for values, found in zip((plain, after), folded.errors["5"], strict=True):
        expected = (values - whole).square().sum(1).mean() / power
        assert found == pytest.approx(float(expected), rel=1e-9)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "cnn": (cnn, (3, 12, 12)),
    "residual, norm, concat": (Residual, (6,)),
    "grouped": (Tied, (3, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("samples", [6, 400])
def test_never_raises_the_error_and_keeps_all_shapes(name: str, samples: int) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    data = batches(samples, shape, 2, size=50)
    model = settled(make().double(), data[0][0])
    groups = discover(model, data[0][0][:2]).groups
    critical = random_slice(groups)
    plain = remove(copy.deepcopy(model), critical, data[0][0][:2])
    folded = fold(model, critical, consumer_statistics(model, data, groups))
    remove(model, critical, data[0][0][:2])
    assert folded.errors
    assert all(after <= before for before, after in folded.errors.values())
    shapes = [
        {key: value.shape for key, value in each.state_dict().items()} for each in (plain, model)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_come_closer_on_other_data(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    data, others = batches(400, shape, 2, size=50), batches(100, shape, 2, seed=1)
    model = settled(make().double(), data[0][0])
    groups = discover(model, data[0][0][:2]).groups
    critical = random_slice(groups)
    whole = outputs(model, others)
    with critical.masked(model):
        plain = (outputs(model, others) - whole).square().mean()
    fitted = copy.deepcopy(model)
    fold(model, critical, consumer_statistics(model, data, groups))
    refit(fitted, critical, data)
    with critical.masked(model):
        folded = (outputs(model, others) - whole).square().mean()
    with critical.masked(fitted):
        refitted = (outputs(fitted, others) - whole).square().mean()
    assert folded < plain
    assert refitted < plain


class Normed(nn.Module):
    """A convolution without a bias and a BatchNorm; ``skip`` reads what lies between, too."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        self.skip = skip
        self.first = nn.Conv2d(8, 6, 1)
        self.second = nn.Conv2d(6, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        between = self.second(self.first(inputs))
        normed = self.norm(between)
        return self.head((normed + between if self.skip else normed).relu())


@pytest.mark.parametrize("skip", [False, True])
def test_constant_goes_into_the_norm_that_follows_or_else_into_a_new_bias(skip: bool) -> None:
    torch.manual_seed(0)
    data = batches(160, (8, 6, 6), 2)
    model = settled(Normed(skip).double(), data[0][0])
    combine(model.first, 4, constant=0.7)
    mean = model.norm.running_mean
    unchanged = mean.clone()
    error, _ = gone_by_error(model, data, {"first": [4]})
    assert error < 1e-9
    assert torch.equal(mean, unchanged)  # replaced, so that an error can put it back
    assert (model.second.bias is None) == (not skip)
    assert torch.equal(model.norm.running_mean, unchanged) == skip


def test_a_norm_that_two_layers_share_gets_no_constant() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(
        nn.Linear(6, 6, bias=False), norm, nn.ReLU(), nn.Linear(6, 6, bias=False), norm,
        nn.Linear(6, 2),
    ).double()  # fmt: skip
    channels = torch.arange(6)
    group = NeuronGroup("0", 6, (Member("3", "in", channels, channels, 6),))
    statistics = consumer_statistics(model, batches(64, (6,), 2), (group,))
    assert statistics["3"].norm is None


def test_too_few_samples_leave_the_weights_alone_with_a_note() -> None:
    torch.manual_seed(0)
    model = mlp(40, (32, 30), 3)
    data = batches(3, (40,), 3)
    groups = discover(model, data[0][0]).groups
    critical = slice_without(groups, {"3": list(range(0, 30, 2))})
    before = model[5].weight.detach().clone()
    folded = fold(model, critical, consumer_statistics(model, data, groups))
    assert torch.equal(model[5].weight, before)
    assert len(folded.notes) == 1
    assert folded.notes[0].startswith("5: 3 samples (worth 3 independent observations) are too few")
    assert folded.errors["5"][1] <= folded.errors["5"][0]


def test_neurons_that_the_others_say_nothing_of_leave_the_weights_alone_with_a_note() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
    # Every pair of signs occurs equally often: the channels are uncorrelated to the digit.
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 6)
    groups = discover(model, signs).groups
    before = model[1].weight.detach().clone()
    statistics = consumer_statistics(model, [signs], groups)
    folded = fold(model, slice_without(groups, {"0": [2]}), statistics)
    assert torch.equal(model[1].weight, before)
    assert "its 5 kept channels do not predict the others" in folded.notes[0]


def test_flattened_map_with_few_samples_is_folded_neuron_by_neuron() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 25, 3)).double()
    combine(model[0], 4, constant=0.7)
    error, folded = gone_by_error(model, batches(30, (8, 5, 5), 2), {"0": [4]})
    assert error < 1e-9
    assert not folded.notes


def test_wide_flattened_map_is_summed_neuron_by_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 3))
    model = model.double()
    data = batches(30, (8, 5, 5), 2)
    groups = discover(model, data[0][0][:2]).groups
    full = consumer_statistics(model, data, groups)["3"]
    monkeypatch.setattr("nss_prune.statistics.consumers.WIDEST_MAP", 100)
    narrow = consumer_statistics(model, data, groups)["3"]
    derived = full.by_neuron(25)
    assert full.covariance.shape == (150, 150)
    assert narrow.covariance.shape == (6, 6)
    torch.testing.assert_close(narrow.mean, full.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(narrow.covariance, derived.covariance, rtol=1e-9, atol=1e-12)
    assert narrow.rows == derived.rows == 30 * 25
    assert narrow.observations == pytest.approx(derived.observations)


def test_statistics_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    model = cnn()
    data = batches(50, (3, 12, 12), 2, size=17)
    groups = discover(model, data[0][0][:2]).groups
    before = fingerprint(model)
    statistics = consumer_statistics(model, data, groups)
    assert_unchanged(model, before)
    model.eval()
    read = torch.cat([model[:4](inputs) for inputs, _ in data]).detach()
    rows = read.movedim(1, -1).reshape(-1, 8)
    found = statistics["4"]
    assert (found.rows, found.samples, found.shape) == (50 * 36, 50, (8, 6, 6))
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.covariance, torch.cov(rows.T, correction=0))


@pytest.mark.parametrize(("alike", "worth"), [(True, 400), (False, 400 * 16)])
def test_positions_count_as_observations_as_far_as_they_differ(alike: bool, worth: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)).double()
    groups = discover(model, torch.randn(2, 5, 4, 4).double()).groups
    inputs = torch.randn(400, 5, 4, 4).double()
    inputs = inputs[:, :, :1, :1].expand(-1, -1, 4, 4) if alike else inputs
    statistics = consumer_statistics(model, [inputs], groups)
    assert statistics["1"].observations == pytest.approx(worth, rel=0.1)


class Standardized(nn.Conv2d):
    """As in timm's models without norms: what acts is not the weight itself."""

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return nn.functional.conv2d(inputs, weight, self.bias)


def test_weights_that_do_not_act_as_they_are_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), Standardized(6, 4, 1)).double()
    data = batches(64, (8, 3, 3), 2)
    # Discovery leaves such a layer alone: the neurons are those of a plain one.
    plain = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)).double()
    groups = discover(plain, data[0][0][:2]).groups
    before = fingerprint(model)
    critical = slice_without(groups, {"0": [1]})
    folded = fold(model, critical, consumer_statistics(model, data, groups))
    assert_unchanged(model, before)
    assert "2 is left unfolded: its type Standardized" in folded.notes[0]


def test_shared_weights_and_readers_without_statistics_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.ReLU()).double()
    data = batches(64, (8,), 2)
    groups = discover(model, data[0][0]).groups
    critical = slice_without(groups, {"0": [1]})
    statistics = consumer_statistics(model, data, groups)
    assert fold(model, critical, {}).notes == ("2 is left unfolded: there are no statistics of it",)
    model.again = nn.Linear(6, 3).double()
    model.again.weight = model[2].weight
    before = fingerprint(model)
    folded = fold(model, critical, statistics)
    assert_unchanged(model, before)
    assert folded.notes == ("2 is left unfolded: its weight is used elsewhere too",)


def test_single_precision_models_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    model = cnn().float()
    for module in (model[4], model[7]):
        module.weight.requires_grad_(False)
    data = [(inputs.float(), labels) for inputs, labels in batches(64, (3, 12, 12), 2)]
    groups = discover(model, data[0][0][:2]).groups
    flags = [parameter.requires_grad for parameter in model.parameters()]
    critical = random_slice(groups)
    folded = fold(model, critical, consumer_statistics(model, data, groups))
    assert set(folded.errors) == {"4", "7", "9"}
    assert all(after < before for before, after in folded.errors.values())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    remove(model, critical, data[0][0][:2])


def test_planning_changes_nothing_and_an_error_undoes_the_rest() -> None:
    torch.manual_seed(0)
    data = batches(64, (8, 6, 6), 2)
    model = settled(Normed().double(), data[0][0])
    groups = discover(model, data[0][0][:2]).groups
    critical = random_slice(groups)
    before = fingerprint(model)
    statistics = consumer_statistics(model, data, groups)
    assert folding(model, critical, statistics)
    assert_unchanged(model, dict(before))
    weight = model.second.weight

    def fold_and_fail() -> None:
        with undone_on_error(model):
            fold(model, critical, statistics)
            assert model.second.weight is not weight
            raise ValueError("later")

    with pytest.raises(RemovalError, match="later"):
        fold_and_fail()
    assert_unchanged(model, before)


def test_refit_of_a_linear_combination_is_exact_through_several_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 6, 1), nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * 16, 7), nn.ReLU(), nn.Linear(7, 3),
    ).double()  # fmt: skip
    data = batches(160, (8, 6, 6), 2)
    settled(model, data[0][0])
    combine(model[0], 4, constant=0.7)
    whole = outputs(model, data)
    critical = slice_without(discover(model, data[0][0][:2]).groups, {"0": [4]})
    folded = refit(model, critical, data)
    assert set(folded.errors) == {"1", "5", "7"}
    assert model[1].bias is None
    remove(model, critical, data[0][0][:2])
    assert (outputs(model, data) - whole).abs().max() < 1e-9


def test_refit_makes_up_for_earlier_layers() -> None:
    torch.manual_seed(0)
    model = mlp(12, (24, 24, 24), 3)
    data = batches(600, (12,), 3, size=100)
    groups = discover(model, data[0][0][:2]).groups
    critical = random_slice(groups)
    whole = outputs(model, data)
    errors = []
    for how in (lambda m: fold(m, critical, consumer_statistics(m, data, groups)),
                lambda m: refit(m, critical, data)):  # fmt: skip
        changed = copy.deepcopy(model)
        how(changed)
        remove(changed, critical, data[0][0][:2])
        errors.append(float((outputs(changed, data) - whole).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_the_first_reader_is_refitted_as_it_is_folded() -> None:
    torch.manual_seed(0)
    model = mlp(12, (24, 24), 3)
    data = batches(600, (12,), 3, size=100)
    groups = discover(model, data[0][0][:2]).groups
    critical = random_slice(groups)
    folded, refitted = copy.deepcopy(model), copy.deepcopy(model)
    fold(folded, critical, consumer_statistics(model, data, groups))
    refit(refitted, critical, data)
    first, second = sorted(name for name, _ in model.named_parameters() if "weight" in name)[1:]
    torch.testing.assert_close(*(m.get_parameter(first) for m in (folded, refitted)))
    different = [m.get_parameter(second) for m in (folded, refitted)]
    assert not torch.allclose(*different)


def test_refit_never_raises_the_error_of_a_reader() -> None:
    torch.manual_seed(0)
    model = mlp(12, (24, 24, 24), 3)
    data = batches(60, (12,), 3, size=30)  # few: a ridge finds little, and must say so
    critical = random_slice(discover(model, data[0][0][:2]).groups)
    folded = refit(model, critical, data)
    assert len(folded.errors) == 3
    assert all(after <= before for before, after in folded.errors.values())


def test_the_pruner_refits_what_it_keeps() -> None:
    torch.manual_seed(0)
    model = mlp(12, (24, 24), 3)
    expected = copy.deepcopy(model)
    data = batches(600, (12,), 3, size=100)
    pruner = NSSPruner(model, data[0][0][:2], data=data, params_budget=0.6, fold="refit")
    pruner.step()
    refit(expected, pruner.slice, data)
    remove(expected, pruner.slice, data[0][0][:2])
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize(
    ("fold", "data", "message"),
    [
        ("refits", [], "fold is 'refits'; use True, False or 'refit'"),
        ("refit", None, "fold='refit' with no data"),
        ("refit", iter([]), "fold='refit' with list_iterator"),
    ],
)
def test_the_pruner_says_what_it_can_fold_from(fold, data, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        NSSPruner(mlp(), torch.zeros(2, 12).double(), data=data, fold=fold)


def test_bad_data_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = mlp()
    good = batches(32, (12,), 3)
    groups = discover(model, good[0][0]).groups
    critical = random_slice(groups)
    before = fingerprint(model)
    with pytest.raises(DataError, match="no batches"):
        consumer_statistics(model, [], groups)
    broken = [*good, (torch.full((4, 12), torch.nan, dtype=torch.float64), torch.zeros(4))]
    with pytest.raises(NumericalError, match="reads NaN"):
        consumer_statistics(model, broken, groups)
    with pytest.raises(NumericalError, match="reads NaN"):
        refit(model, critical, broken)
    with pytest.raises(DataError, match="refuses"):
        refit(model, critical, [*good, (torch.zeros(4, 5).double(), torch.zeros(4))])
    with pytest.raises(ArgumentError, match="only once"):
        refit(model, critical, iter(good))
    assert_unchanged(model, before)


def test_statistics_of_another_model_are_refused() -> None:
    torch.manual_seed(0)
    model, other = mlp(), mlp(hidden=(16, 9))
    data = batches(32, (12,), 3)
    groups = discover(model, data[0][0]).groups
    foreign = consumer_statistics(other, data, discover(other, data[0][0]).groups)
    before = fingerprint(model)
    with pytest.raises(ModelMismatchError, match="of 9 channels, it reads 11"):
        fold(model, random_slice(groups), foreign)
    with pytest.raises(ModelMismatchError):
        fold(other, random_slice(groups), foreign)
    assert_unchanged(model, before)


def test_heads_are_folded_channel_by_channel() -> None:
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=4, num_classes=3
    ).eval()
    inputs = torch.randn(64, 3, 16, 16)
    groups = discover(model, inputs[:2]).groups
    heads = [group for group in groups if not group.has_channels]
    if not heads:
        pytest.skip("this version of timm cannot take fewer heads")
    name = heads[0].consumers[0].name
    assert map_positions(model.get_submodule(name), sides_by_consumer(groups)[name]) == 1
    critical = Slice({heads[0].name: torch.tensor([True, False, True, True])}, groups)
    whole = model(inputs)
    with critical.masked(model):
        plain = (model(inputs) - whole).square().sum()
    folded = fold(model, critical, consumer_statistics(model, [(inputs, None)], groups))
    assert folded.errors[name][1] < folded.errors[name][0]
    with critical.masked(model):
        assert (model(inputs) - whole).square().sum() < plain
