"""DeepLIFT against paper, captum, and its own defining property: completeness."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import timm
import torch
import torchvision
from captum.attr import LayerDeepLift
from torch import Tensor, nn
from torch.nn import functional

from networks import assert_unchanged, fingerprint, hand_weighted, settled
from nss_prune.core.models import evaluation
from nss_prune.errors import ArgumentError, DataError
from nss_prune.graph.groups import find_neurons
from nss_prune.graph.tracing import trace
from nss_prune.profiling.contributions.deeplift import (
    DeepLift,
    count_references,
    difference,
    target_scores,
    with_reference,
)
from nss_prune.profiling.contributions.protocol import Contribution
from nss_prune.profiling.contributions.rescale import RescaleRule
from nss_prune.statistics.capture import Reading, Watcher

SAMPLES = 4


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Seeded, and on one thread: in networks this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def inputs_kept(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The inputs of modules, with a gradient to be had after the backward pass."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs = arguments[0]
            needs = inputs.requires_grad
            kept[name] = inputs.view_as(inputs) if needs else inputs.detach().requires_grad_()
            kept[name].retain_grad()
            return (kept[name], *arguments[1:])

        return hook

    with contextlib.ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(keep(name))
            stack.callback(handle.remove)
        yield kept


class Explained:
    """Contributions of what some modules read, and how much of the output they must explain."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        names: Sequence[str] = ("",),
        reference: Any = "zeros",
        targets: Tensor | None = None,
        references: int | None = None,
    ) -> None:
        samples = len(inputs)
        rule = RescaleRule(samples, references)
        with evaluation(model), inputs_kept(model, names) as kept, rule:
            outputs = model(with_reference(inputs, reference, references))
            targets = torch.arange(samples) % outputs.shape[1] if targets is None else targets
            target_scores(outputs, targets, samples).backward()
        change = difference(outputs.detach(), samples)
        self.change = change.gather(1, targets.unsqueeze(1)).squeeze(1)
        self.uncovered = rule.uncovered
        self.contributions = {
            name: difference(values.detach(), samples) * values.grad[:samples]
            for name, values in kept.items()
        }

    def error(self, name: str = "") -> float:
        """Largest gap between contributions and change, relative to the largest change."""
        sums = self.contributions[name].flatten(1).sum(1)
        return float((sums - self.change).abs().max() / self.change.abs().max())


def assert_complete(
    model: nn.Module, inputs: Tensor, names: Sequence[str] = ("",), **arguments: Any
) -> Explained:
    explained = Explained(model, inputs, names, **arguments)
    assert explained.uncovered == set()
    assert float(explained.change.abs().max()) > 1e-4
    for name in names:
        assert explained.error(name) < 1e-9, name
    if count_references(inputs, arguments.get("reference", "zeros")) == 1:
        assert_one_reference_does(explained, model, inputs, names, **arguments)
    return explained


def assert_one_reference_does(
    explained: Explained, model: nn.Module, inputs: Tensor, names: Sequence[str], **arguments: Any
) -> None:
    """A reference of all samples gives what the same reference of each gives."""
    shared = Explained(model, inputs, names, references=1, **arguments)
    assert shared.uncovered == explained.uncovered
    for name in names:
        expected = explained.contributions[name]
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            shared.contributions[name], expected, rtol=1e-9, atol=1e-11 * scale
        )


def images(size: int = 12, samples: int = SAMPLES, channels: int = 3) -> Tensor:
    return torch.randn(samples, channels, size, size, dtype=torch.float64)


class Calls(nn.Module):
    """A function as a module, between two layers with weights."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(5, width).double()
        self.function = function
        with torch.no_grad():
            features = function(torch.zeros(2, width).double()).flatten(1).shape[1]
        self.last = nn.Linear(features, 3).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.function(self.first(inputs)).flatten(1))


# On paper


def test_saturated_unit_on_paper() -> None:
    # Shrikumar et al., figure 1: y = 1 - relu(1 - a - b) is saturated at a = b = 1, its gradient
    # is 0, and yet each input accounts for half of the change from 0 to 1.
    model = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[-1.0, -1.0]]))
        model[0].bias.fill_(1)
        model[2].weight.fill_(-1)
        model[2].bias.fill_(1)
    explained = Explained(model, torch.ones(1, 2, dtype=torch.float64), ("0", "2"))
    assert explained.contributions["0"].tolist() == [[0.5, 0.5]]
    assert explained.contributions["2"].tolist() == [[1.0]]


def test_neurons_on_paper() -> None:
    # The neurons emit u, v, u + v and 0, class 0 reads u + 2 (u + v), class 1 reads v. Between
    # (1, 2) and (3, 1) they change by -2, 1, -1 and 0.
    model = hand_weighted()
    inputs = torch.tensor([[1.0, 2], [1, 2]], dtype=torch.float64)
    reference = torch.tensor([3.0, 1], dtype=torch.float64)
    graph, outputs = trace(model, inputs)
    neurons = find_neurons(model, graph, outputs)
    metric = DeepLift()
    gathered: list[Tensor] = []

    def collect(reading: Reading, gradient: Tensor) -> None:
        gathered.append(metric.gather(difference(reading.activation, 2), gradient[:2]))

    watcher = Watcher(neurons.groups, 4, on_gradient=collect)
    with evaluation(model), watcher.attached(model), RescaleRule(2):
        scores = model(with_reference(inputs, reference))
        target_scores(scores, torch.tensor([0, 1]), 2).backward()
    (values,) = gathered
    assert metric.per_sample(values, 1).tolist() == [[[-2, 0, -2, 0], [0, 1, 0, 0]]]
    assert metric.score(values.mean(1, keepdim=True)).tolist() == [[-1, 0.5, -1, 0]]


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Sigmoid(), nn.SiLU()])
def test_naive_oracle(activation: nn.Module) -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), activation, nn.Linear(4, 5), activation, nn.Linear(5, 2)
    ).double()
    inputs = torch.randn(SAMPLES, 3, dtype=torch.float64)
    reference = torch.randn(3, dtype=torch.float64)
    targets = torch.tensor([0, 1, 1, 0])
    explained = Explained(model, inputs, ("0", "2", "4"), reference, targets)
    for sample in range(SAMPLES):
        expected = naive_deeplift(model, inputs[sample], reference, int(targets[sample]))
        for name, values in expected.items():
            actual = explained.contributions[name][sample].tolist()
            assert actual == pytest.approx(values, rel=1e-12, abs=1e-14)


def naive_deeplift(
    model: nn.Sequential, given: Tensor, reference: Tensor, target: int
) -> dict[str, list[float]]:
    """The multiplier rules of the paper, one unit at a time: linear, rescale, chain."""
    values, references = [given.tolist()], [reference.tolist()]
    for layer in model:
        values.append(layer(torch.tensor(values[-1], dtype=torch.float64)).tolist())
        references.append(layer(torch.tensor(references[-1], dtype=torch.float64)).tolist())
    multipliers = [float(unit == target) for unit in range(len(values[-1]))]
    contributions = {}
    for position in reversed(range(len(model))):
        layer, before, before_reference = model[position], values[position], references[position]
        if isinstance(layer, nn.Linear):
            weight = layer.weight.tolist()
            multipliers = [
                sum(weight[out][unit] * multipliers[out] for out in range(len(multipliers)))
                for unit in range(len(before))
            ]
            contributions[str(position)] = [
                (x - r) * m for x, r, m in zip(before, before_reference, multipliers, strict=True)
            ]
        else:
            after, after_reference = values[position + 1], references[position + 1]
            multipliers = [
                multipliers[unit]
                * (after[unit] - after_reference[unit])
                / (before[unit] - before_reference[unit])
                for unit in range(len(before))
            ]
    return contributions


# Equal to captum where captum is right


def captum_networks() -> dict[str, tuple[nn.Sequential, Tensor]]:
    vectors = torch.randn(SAMPLES, 6, dtype=torch.float64)
    networks: dict[str, tuple[nn.Sequential, Tensor]] = {
        kind.__name__: (
            nn.Sequential(nn.Linear(6, 9), kind(), nn.Linear(9, 8), kind(), nn.Linear(8, 3)),
            vectors,
        )
        for kind in (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Softplus)
    }
    networks["convolutions"] = (
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.Sigmoid(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 10),
            nn.Tanh(),
            nn.Linear(10, 3),
        ),
        images(),
    )
    networks["max pooling"] = (
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(45, 3)
        ),
        images(),
    )
    return networks


@pytest.mark.parametrize("name", captum_networks())
def test_equals_captum(name: str) -> None:
    model, inputs = captum_networks()[name]
    model.double().eval()
    reference = torch.randn_like(inputs[:1])
    targets = torch.arange(SAMPLES) % 3
    consumers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))][1:]
    explained = Explained(model, inputs, consumers, reference, targets)
    assert explained.uncovered == set()
    for consumer in consumers:
        expected = LayerDeepLift(model, model.get_submodule(consumer)).attribute(
            inputs,
            reference.expand_as(inputs),
            target=targets,
            attribute_to_layer_input=True,
        )
        gap = (explained.contributions[consumer] - expected).abs().max()
        assert gap < 1e-8 * expected.abs().max()
        assert explained.error(consumer) < 1e-9


# Complete, whatever the function

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "F.relu": functional.relu,
    "F.relu in place": lambda x: functional.relu(x, inplace=True),
    "Tensor.relu_": lambda x: x.relu_(),
    "ReLU in place": nn.ReLU(inplace=True),
    "relu6": functional.relu6,
    "ReLU6 in place": nn.ReLU6(inplace=True),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "clamp": lambda x: x.clamp(min=-0.3, max=0.4),
    "clamp_": lambda x: x.clamp_(min=0.1),
    "gelu": functional.gelu,
    "gelu tanh": nn.GELU(approximate="tanh"),
    "silu": functional.silu,
    "SiLU in place": nn.SiLU(inplace=True),
    "swish": lambda x: x * x.sigmoid(),
    "swish in place": lambda x: x.mul_(x.sigmoid()),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(inplace=True),
    "hardsigmoid": nn.Hardsigmoid(),
    "sigmoid": nn.Sigmoid(),
    "tanh": torch.tanh,
    "softplus": nn.Softplus(beta=2),
    "softsign": nn.Softsign(),
    "elu": nn.ELU(0.5),
    "elu in place": nn.ELU(inplace=True),
    "celu": nn.CELU(0.7),
    "selu": nn.SELU(),
    "leaky_relu": nn.LeakyReLU(0.2, inplace=True),
    "rrelu": nn.RReLU().eval(),
    "prelu": nn.PReLU(8, init=0.3).double(),
    "threshold": nn.Threshold(0.1, -0.2),
    "logsigmoid": nn.LogSigmoid(),
    "softshrink": nn.Softshrink(0.2),
    "hardshrink": nn.Hardshrink(0.2),
    "tanhshrink": nn.Tanhshrink(),
    "exp": torch.exp,
    "power": lambda x: x**3,
    "root": lambda x: (x * x + 1).sqrt(),
    "number over activation": lambda x: 2 / (x.square() + 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    model = Calls(FUNCTIONS[name])
    inputs = torch.randn(SAMPLES, 5, dtype=torch.float64)
    assert_complete(model, inputs, ("", "last"), reference=torch.randn(5))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_a_change_it_is_the_derivative(name: str) -> None:
    model = Calls(FUNCTIONS[name])
    inputs = torch.randn(SAMPLES, 5, dtype=torch.float64)
    doubled = with_reference(inputs, inputs).requires_grad_()
    with evaluation(model), RescaleRule(SAMPLES):
        (multiplier,) = torch.autograd.grad(model(doubled)[:SAMPLES].sum(), doubled)
    inputs.requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
    torch.testing.assert_close(multiplier[:SAMPLES], gradient, rtol=1e-12, atol=1e-14)


def test_tiny_changes_use_the_derivative() -> None:
    inputs = torch.tensor([[0.7, 0.7]])
    doubled = with_reference(inputs, inputs * (1 + 2e-7)).requires_grad_()
    with RescaleRule(1):
        functional.silu(doubled).sum().backward()
    inputs.requires_grad_()
    functional.silu(inputs).sum().backward()
    assert not torch.equal(doubled[0], doubled[1])
    assert torch.equal(doubled.grad[:1], inputs.grad)


def test_a_small_scale_is_not_a_tiny_change() -> None:
    inputs = torch.tensor([[3e-30]])
    doubled = with_reference(inputs, torch.tensor([-1e-30])).requires_grad_()
    with RescaleRule(1):
        torch.relu(doubled).sum().backward()
    assert doubled.grad.flatten().tolist() == pytest.approx([0.75, 0])


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda x: x * x,
    "gate": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "gate in place": lambda x: x.mul_(torch.sigmoid(x.mean(1, keepdim=True))),
    "glu": lambda x: functional.glu(x[:, :6]),
    "swiglu": lambda x: functional.silu(x[:, :3]) * x[:, 3:6],
    "quotient": lambda x: x / (x.square().sum(1, keepdim=True) + 1),
    "quotient in place": lambda x: x.sigmoid().div_(x.square() + 1),
    "torch.div by a number": lambda x: torch.div(torch.relu(x), 3),
    "torch.div of a number": lambda x: torch.div(3, x.exp()),
    "matmul": lambda x: x[:, :6].unflatten(1, (2, 3)) @ x[:, 1:7].unflatten(1, (3, 2)),
    "bmm": lambda x: torch.bmm(x[:, :4].unflatten(1, (2, 2)), x[:, 3:7].unflatten(1, (2, 2))),
    "heads": lambda x: x[:, :6].view(-1, 1, 3, 2) @ x[:, 1:7].view(-1, 1, 2, 3),
    "linear attention": lambda x: (
        torch.relu(x[:, :4].unflatten(1, (2, 2)))
        @ (torch.relu(x[:, 1:5].unflatten(1, (2, 2))) @ x[:, 3:7].unflatten(1, (2, 2)))
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    model = Calls(PRODUCTS[name])
    inputs = torch.randn(SAMPLES, 5, dtype=torch.float64)
    assert_complete(model, inputs, ("", "last"), reference=torch.randn(5))


def test_product_shares_are_those_of_shapley() -> None:
    values = torch.tensor([[3.0, 5.0], [1.0, 2.0]], requires_grad=True)
    with RescaleRule(1):
        first, second = values.split(1, dim=1)
        (first * second)[:1].sum().backward()
    # From 1 · 2 to 3 · 5: changing the first factor adds 4 or 10, the second 3 or 9.
    assert (difference(values.detach(), 1) * values.grad[:1]).tolist() == [[7.0, 6.0]]


def test_factor_computed_before_the_first_gradient() -> None:
    gate = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()).double()
    inputs = torch.randn(SAMPLES, 3, dtype=torch.float64)
    doubled = with_reference(inputs)
    with evaluation(gate), RescaleRule(SAMPLES) as rule:
        factor = gate(doubled)
        followed = doubled.clone().requires_grad_()
        (followed * factor)[:SAMPLES].sum().backward()
    assert rule.uncovered == set()
    expected = (factor[:SAMPLES] + factor[SAMPLES:]) / 2
    torch.testing.assert_close(followed.grad[:SAMPLES], expected)


def test_factors_of_other_types() -> None:
    doubled = torch.randn(2 * SAMPLES, 3, requires_grad=True)
    with RescaleRule(SAMPLES):
        (doubled * (torch.arange(2 * SAMPLES) % 2 == 0).unsqueeze(1)).sum().backward()
    assert doubled.grad[:SAMPLES, 0].tolist() == [1, 0] * (SAMPLES // 2)
    matrices = torch.randn(2 * SAMPLES, 3, 3, requires_grad=True)
    with RescaleRule(SAMPLES):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = matrices @ matrices
        outputs.sum().backward()
    assert outputs.dtype == torch.bfloat16
    assert matrices.grad.dtype == torch.float32


POOLS: dict[str, nn.Module] = {
    "2 x 2": nn.MaxPool2d(2),
    "overlapping": nn.MaxPool2d(3, stride=2),
    "padded": nn.MaxPool2d(3, stride=2, padding=1),
    "ceil mode": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    "dilated": nn.MaxPool2d(2, stride=1, dilation=2),
    "unpadded stride 1": nn.MaxPool2d((2, 3), stride=1),
    "adaptive": nn.AdaptiveMaxPool2d((5, 3)),
    "1d": nn.Sequential(nn.Flatten(2), nn.MaxPool1d(5, 2, 2), nn.AdaptiveMaxPool1d(7)),
    "3d": nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.MaxPool3d(2, 1),
        nn.AdaptiveMaxPool3d((2, 3, 3)),
        nn.Flatten(1, 2),
    ),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("before", [nn.Identity(), nn.ReLU(inplace=True), nn.Tanh()])
@pytest.mark.parametrize("name", POOLS)
def test_max_pooling(name: str, before: nn.Module, channels_last: bool) -> None:
    pool = copy.deepcopy(POOLS[name])
    inputs = images(samples=2)
    if channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), before, pool, nn.Flatten()).double()
    model = nn.Sequential(*body, nn.Linear(body(inputs).shape[1], 3)).double()
    assert_complete(model, inputs, ("", "2", "3"), reference=torch.randn_like(inputs))


def test_max_pooling_on_paper() -> None:
    # Windows (1, 4), (4, 2) against (3, 0), (0, 5): in the first the input's maximum is larger
    # and gives 4 - 3 over a change of 4, in the second the reference's, with 4 - 5 over -3.
    values = torch.tensor([[[1.0, 4, 2]], [[3.0, 0, 5]]], requires_grad=True)
    with RescaleRule(1):
        functional.max_pool1d(values, 2, stride=1)[:1].sum().backward()
    torch.testing.assert_close(values.grad[0], torch.tensor([[0, 1 / 4, 1 / 3]]))


def test_pooling_indices_are_still_returned() -> None:
    doubled = images(samples=2).requires_grad_()
    with RescaleRule(1):
        values, indices = functional.max_pool2d(doubled, 2, return_indices=True)
        adaptive = functional.adaptive_max_pool2d(doubled, 3, return_indices=True)
    assert torch.equal(doubled.flatten(2).gather(2, indices.flatten(2)), values.flatten(2))
    assert len(adaptive) == 2


class Twisted(nn.Module):
    """Reused modules, a functional activation, an in-place residual and a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.act(self.stem(inputs))
        for _ in range(2):
            branch = functional.silu(self.norm(self.body(stream)))
            branch += stream
            stream = self.act(branch - 0.3)
        pooled = functional.max_pool2d(stream, 3, 2, 1)
        pooled = torch.cat([pooled.mean((2, 3)), pooled.flatten(2).sum(2).tanh()], 1)
        return self.head(pooled)


def test_reused_modules_residuals_and_functions() -> None:
    model = settled(Twisted().double(), images(samples=8))
    assert_complete(model, images(), ("", "head"), reference=images(samples=1))


def test_in_place_keeps_what_aliases_see() -> None:
    def forward(inputs: Tensor) -> Tensor:
        stream = inputs * 1
        functional.relu(stream, inplace=True)
        stream.mul_(torch.sigmoid(stream))
        return stream

    doubled = torch.randn(2 * SAMPLES, 5, dtype=torch.float64, requires_grad=True)
    with RescaleRule(SAMPLES):
        outputs = forward(doubled)
    torch.testing.assert_close(outputs, forward(doubled), rtol=1e-14, atol=0)


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "resnet18": (torchvision.models.resnet18, 32, ("layer2", "layer4", "fc")),
    "vgg11_bn": (torchvision.models.vgg11_bn, 32, ("features.4", "features.15", "classifier.3")),
    "alexnet": (torchvision.models.alexnet, 64, ("features.3", "features.8", "classifier.1")),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 32, ("features.5", "classifier.1")),
    "mobilenet_v3_small": (
        torchvision.models.mobilenet_v3_small, 32, ("features.2", "features.9", "classifier.3"),
    ),
    "efficientnet_lite0": (
        lambda num_classes: timm.create_model("efficientnet_lite0", num_classes=num_classes),
        32, ("blocks.2", "conv_head", "classifier"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str) -> None:
    make, size, cuts = ARCHITECTURES[name]
    model = settled(make(num_classes=5).double(), images(size))
    before = fingerprint(model)
    inputs = images(size, samples=2)
    explained = assert_complete(model, inputs, ("", *cuts), reference=images(size, samples=1))
    assert_unchanged(model, before)
    assert explained.contributions[cuts[-1]].shape[0] == 2


# What is not covered is named


class Attention(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return (tokens @ tokens.mT).softmax(-1) @ tokens


@torch.jit.script
def scripted(values: Tensor) -> Tensor:
    return torch.relu(values)


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


UNCOVERED: dict[str, tuple[Callable[[Tensor], Tensor], set[str]]] = {
    "softmax": (lambda x: x.softmax(1), {"softmax"}),
    "log_softmax": (lambda x: functional.log_softmax(x, 1), {"log_softmax"}),
    "attention": (lambda x: Attention()(x[:, :6].unflatten(1, (2, 3))), {"softmax"}),
    "layer norm": (lambda x: functional.layer_norm(x, (7,)), {"native_layer_norm"}),
    "group norm": (nn.GroupNorm(1, 7).double(), {"native_group_norm"}),
    "batch norm in training": (nn.BatchNorm1d(7).double().train(), {"native_batch_norm"}),
    "grid": (
        lambda x: functional.grid_sample(
            torch.ones(len(x), 1, 4, 4).double(), x[:, :6].view(-1, 1, 3, 2), align_corners=False
        ),
        {"grid_sampler2d"},
    ),
    "maximum": (lambda x: torch.maximum(x, -x), {"maximum"}),
    "in place on a view": (lambda x: x.view(-1, 7).relu_(), {"copy_slices"}),
    "scripted": (scripted, {"relu"}),
    "custom": (Custom.apply, {"custom"}),
    "samples not first": (lambda x: torch.relu(x.T).T, {"relu"}),
    "product over other axes": (lambda x: (x.T * x.T.sigmoid()).T, {"mul", "sigmoid"}),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_uncovered_functions_are_named(name: str) -> None:
    function, expected = UNCOVERED[name]
    doubled = torch.randn(2 * SAMPLES, 7, dtype=torch.float64, requires_grad=True)
    with RescaleRule(SAMPLES) as rule:
        outputs = torch.relu(function(doubled * 1))
        assert rule.uncovered == set()
        outputs[:SAMPLES].sum().backward()
    assert rule.uncovered == expected
    ordinary = doubled.detach().requires_grad_()
    function(ordinary * 1).sum().backward()
    assert ordinary.grad.isfinite().all()


def test_uncovered_of_a_vision_transformer() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2,
        num_classes=3,
    )  # fmt: skip
    uncovered = Explained(model.double(), images(16)).uncovered
    assert "native_layer_norm" in uncovered
    assert any("softmax" in name or "attention" in name for name in uncovered)


def test_uncovered_without_a_backward_pass() -> None:
    doubled = torch.randn(2, 3, requires_grad=True)
    with RescaleRule(1) as rule:
        rule.inspect(doubled.softmax(1))
    assert rule.uncovered == {"softmax"}


@pytest.mark.parametrize("backward", [torch.autograd.grad, lambda y, x: y.backward()])
def test_uncovered_through_any_backward(backward: Callable[[Tensor, Tensor], Any]) -> None:
    doubled = torch.randn(2, 3, requires_grad=True)
    with RescaleRule(1) as rule:
        backward(doubled.softmax(1)[:1].sum(), doubled)
    assert rule.uncovered == {"softmax"}


# The context


def test_nothing_stays_after_an_error() -> None:
    model = Twisted().double().eval()
    before = fingerprint(model)
    with pytest.raises(RuntimeError), evaluation(model), RescaleRule(SAMPLES):
        model(images(channels=4))
    assert_unchanged(model, before)
    outputs = torch.relu(torch.ones(2, requires_grad=True))
    assert type(outputs.grad_fn).__name__ == "ReluBackward0"


def test_outputs_are_those_of_the_model() -> None:
    model = settled(Twisted().double(), images(samples=8))
    inputs = images()
    with evaluation(model), RescaleRule(SAMPLES):
        outputs = model(with_reference(inputs))
    torch.testing.assert_close(outputs[:SAMPLES], model(inputs), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(outputs[SAMPLES:], model(torch.zeros_like(inputs)))


def test_half_precision_and_autocast() -> None:
    model = Twisted().eval()
    inputs = images().float()
    exact = Explained(copy.deepcopy(model).double(), inputs.double(), ("head",))
    with torch.autocast("cpu", torch.bfloat16):
        rough = Explained(model, inputs, ("head",))
    gap = rough.contributions["head"] - exact.contributions["head"]
    assert rough.uncovered == set()
    assert gap.abs().max() < 0.05 * exact.contributions["head"].abs().max()


# The metric and its helpers


def test_is_a_contribution() -> None:
    assert isinstance(DeepLift(), Contribution)
    assert DeepLift().name == "deeplift"
    assert DeepLift().needs_gradient
    assert DeepLift().needs_reference
    assert DeepLift().per_sample(torch.ones(1, 2, 3), 5).dtype == torch.float64


def test_references() -> None:
    inputs = torch.ones(2, 3)
    assert with_reference(inputs)[2:].tolist() == [[0.0] * 3] * 2
    assert with_reference(inputs, torch.tensor([1.0, 2, 3]))[2:].tolist() == [[1, 2, 3]] * 2
    assert with_reference(inputs, torch.tensor(7))[2:].tolist() == [[7] * 3] * 2
    ids = torch.tensor([[1, 2], [3, 4]])
    assert with_reference(ids, torch.tensor(0))[2:].tolist() == [[0, 0]] * 2
    assert with_reference(inputs, "zeros", references=1)[2:].tolist() == [[0.0] * 3]


def test_how_many_references_are_needed() -> None:
    inputs = torch.ones(2, 3)
    each = torch.tensor([[1.0], [2.0]])
    for baseline in ("zeros", torch.ones(3), torch.tensor(7), torch.ones(1, 3)):
        assert count_references(inputs, baseline) == 1
    assert count_references(inputs, each) == 2
    assert count_references((inputs, inputs), ("zeros", torch.ones(3))) == 1
    assert count_references((inputs, inputs), ("zeros", each)) == 2
    assert count_references({"x": inputs, "mask": torch.tensor([True, False])}) == 2
    assert count_references({"x": inputs, "shared": torch.ones(5)}) == 1


def test_references_of_several_inputs() -> None:
    inputs = {"x": torch.ones(2, 3), "mask": torch.tensor([True, False]), "shared": torch.ones(5)}
    doubled = with_reference({**inputs, "flag": None})
    assert doubled["x"].shape == (4, 3)
    assert doubled["mask"].tolist() == [True, False, True, False]
    assert doubled["shared"].shape == (5,)
    assert doubled["flag"] is None
    pair = with_reference((torch.ones(2, 3), torch.ones(2)), ("zeros", torch.tensor(4.0)))
    assert pair[0][2:].eq(0).all()
    assert pair[1].tolist() == [1, 1, 4, 4]


@pytest.mark.parametrize(
    ("inputs", "baseline", "message"),
    [
        (torch.ones(2, 3), "median", "use 'zeros'"),
        (torch.ones(2, 3), torch.ones(4), "one sample"),
        (torch.ones(2, 3, dtype=torch.long), "zeros", "padding tokens"),
        ((torch.ones(2, 3), torch.ones(2)), torch.ones(3), "one baseline for each input"),
        ({"x": torch.ones(2)}, {"y": torch.ones(1)}, "one baseline for each input"),
    ],
)
def test_references_that_do_not_fit(inputs: Any, baseline: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        with_reference(inputs, baseline)


def test_references_need_samples() -> None:
    with pytest.raises(DataError, match="first axis"):
        with_reference({"scale": 3.0})


def test_target_scores() -> None:
    scores = torch.arange(12.0).view(4, 3)
    assert target_scores(scores, torch.tensor([2, 0]), 2) == 2 + 3
    assert target_scores(scores, torch.tensor([[1, 0, 1], [0, 1, 0]]), 2) == 0 + 2 + 4
    assert target_scores(scores, None, 2) == sum(range(6))
    dense = torch.arange(24.0).view(4, 3, 2)
    assert target_scores(dense, torch.tensor([[0, 1], [2, 2]]), 2) == 0 + 3 + 10 + 11


@pytest.mark.parametrize(
    "targets", [torch.tensor([0, 3]), torch.tensor([0, -1]), torch.tensor([0]), torch.rand(2)]
)
def test_targets_that_are_no_classes(targets: Tensor) -> None:
    with pytest.raises(DataError, match="classes|class index"):
        target_scores(torch.zeros(4, 3), targets, 2)
