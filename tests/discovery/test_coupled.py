"""Channels that go together in blocks, and hidden units: removed equals masked, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional

from networks import assert_unchanged, fingerprint
from nss_prune import NSSPruner
from nss_prune.discovery.whole import discover
from nss_prune.errors import GraphError, NothingToPruneError
from nss_prune.graph.coupled import candidates, components, followed, reasons_to_stay
from nss_prune.graph.groups import MAKES_THE_OUTPUT
from nss_prune.graph.neurons import NeuronGroup, NeuronMap
from nss_prune.graph.slices import Slice
from nss_prune.surgery.removal import remove
from nss_prune.surgery.trial import verified

PICTURES, TOKENS, VECTORS = (3, 8, 8), (5, 6), (6,)


class Between(nn.Module):
    """Two convolutions, and what happens to the channels between them."""

    def __init__(self, made: int, read: int, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, made, 3, padding=1), nn.Conv2d(read, 10, 1)
        self.head = nn.Linear(10, 4)
        self.between = between

    def forward(self, pictures: Tensor) -> Tensor:
        maps = self.between(self.first(pictures))
        return self.head(self.second(maps).relu().mean((2, 3)))


def gated(maps: Tensor) -> Tensor:
    value, gate = maps.chunk(2, 1)
    return value * gate.sigmoid()


def gated_by_neighbours(maps: Tensor) -> Tensor:
    return maps[:, ::2] * maps[:, 1::2].sigmoid()


def halves_exchanged(maps: Tensor) -> Tensor:
    half = maps.shape[1] // 2
    return torch.cat([maps[:, half:], maps[:, :half]], 1)


def gates_of_a_cell(maps: Tensor) -> Tensor:
    values, forget, out, candidate = maps.chunk(4, 1)
    return out.sigmoid() * (forget.sigmoid() + values.sigmoid() * candidate.tanh()).tanh()


def shuffled(maps: Tensor) -> Tensor:
    samples, channels, height, width = maps.shape
    maps = maps.view(samples, 3, channels // 3, height, width)
    return maps.transpose(1, 2).reshape(samples, channels, height, width)


def pixels(maps: Tensor) -> Tensor:
    return functional.pixel_shuffle(maps, 2)


def no_pixels(maps: Tensor) -> Tensor:
    return functional.pixel_unshuffle(maps, 2)


def pooled_gate(maps: Tensor) -> Tensor:
    """Of halves that meet after pooling and padding."""
    value, gate = functional.max_pool2d(maps, 2).split(maps.shape[1] // 2, 1)
    return functional.pad(value, (1, 1, 1, 1)) + functional.pad(gate, (1, 1, 1, 1))


BETWEEN: dict[str, tuple[int, int, Callable[[Tensor], Tensor], int]] = {
    "chunk": (24, 12, gated, 12),
    "neighbours": (24, 12, gated_by_neighbours, 12),
    "exchanged halves": (12, 12, halves_exchanged, 6),
    "four gates": (32, 8, gates_of_a_cell, 8),
    "glu": (24, 12, lambda maps: functional.glu(maps, 1), 12),
    "channel shuffle": (12, 12, shuffled, 4),
    "channel shuffle of torch": (12, 12, nn.ChannelShuffle(3), 4),
    "pixel shuffle": (24, 6, pixels, 6),
    "pixel unshuffle": (6, 24, no_pixels, 6),
    "pooled halves": (24, 12, pooled_gate, 12),
}
"""Name -> channels made and read, what is between, and the neurons of the first layer."""


class Scaled(Between):
    """Gates with a bare gain for each channel, and one for all of them."""

    def __init__(self) -> None:
        super().__init__(24, 12, self.scaled)
        self.gain = nn.Parameter(torch.ones(24, 1, 1))
        self.position = nn.Parameter(torch.ones(1, 12, 8, 1))
        self.temperature = nn.Parameter(torch.ones(1))

    def scaled(self, maps: Tensor) -> Tensor:
        return gated(maps * self.gain * self.temperature) + self.position


class ConvolutionNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, side: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs), nn.SiLU()

    def forward(self, maps: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(maps)))


class Bottleneck(nn.Module):
    def __init__(self, channels: int, residual: bool) -> None:
        super().__init__()
        self.cv1, self.cv2 = (ConvolutionNorm(channels, channels, 3) for _ in range(2))
        self.residual = residual

    def forward(self, maps: Tensor) -> Tensor:
        made = self.cv2(self.cv1(maps))
        return maps + made if self.residual else made


class C2f(nn.Module):
    """As the detectors of ultralytics have it: halves, bottlenecks on the second, all together."""

    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        self.stem, self.cv1 = ConvolutionNorm(3, 8, 3), ConvolutionNorm(8, 16)
        self.m = nn.ModuleList(Bottleneck(8, residual) for _ in range(2))
        self.cv2, self.head = ConvolutionNorm(32, 12), nn.Linear(12, 4)

    def forward(self, pictures: Tensor) -> Tensor:
        parts = list(self.cv1(self.stem(pictures)).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.head(self.cv2(torch.cat(parts, 1)).mean((2, 3)))


class C2fBySizes(C2f):
    """Halves by a number that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8

    def forward(self, pictures: Tensor) -> Tensor:
        parts = list(self.cv1(self.stem(pictures)).split((self.c, self.c), 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.head(self.cv2(torch.cat(parts, 1)).mean((2, 3)))


class Generator(nn.Module):
    """A vector that becomes a map."""

    def __init__(self, unflatten: nn.Module | None = None) -> None:
        super().__init__()
        self.unflatten = unflatten
        self.fc, self.up = nn.Linear(6, 8 * 3 * 3), nn.ConvTranspose2d(8, 5, 2, 2)
        self.out = nn.Conv2d(5, 4, 3)

    def forward(self, vectors: Tensor) -> Tensor:
        maps = self.fc(vectors)
        if self.unflatten is None:
            maps = maps.reshape(len(vectors), -1, 3, 3).relu()
        else:
            maps = self.unflatten(maps)
        return self.out(self.up(maps).relu()).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(
        self, kind: Any, *, sequence_first: bool = False, states: bool = False, **more: Any
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 9)
        self.rec = kind(9, 10, batch_first=not sequence_first, **more)
        self.head = nn.Linear(10 * (2 if self.rec.bidirectional and not states else 1), 4)
        self.time, self.states = (0 if sequence_first else 1), states

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.stem(tokens).relu()
        outputs, states = self.rec(hidden.transpose(0, 1) if self.time == 0 else hidden)
        if self.states:
            return self.head((states[0] if isinstance(states, tuple) else states)[-1])
        return self.head(outputs.mean(self.time))


class Stacked(nn.Module):
    """Two recurrent layers; the second starts from the states of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.start = nn.LSTM(6, 10, batch_first=True), nn.GRU(6, 8, batch_first=True)
        self.second, self.head = nn.GRU(10, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        _, state = self.start(tokens)
        return self.head(self.second(self.first(tokens)[0], state)[0][:, -1])


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Recurrent(nn.LSTM),
    "two bidirectional LSTM": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "sequence first": lambda: Recurrent(nn.LSTM, sequence_first=True),
    "without biases": lambda: Recurrent(nn.LSTM, bias=False),
    "states": lambda: Recurrent(nn.LSTM, num_layers=2, states=True),
    "GRU": lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True),
    "RNN": lambda: Recurrent(nn.RNN, num_layers=2),
    "RNN of rectified units": lambda: Recurrent(nn.RNN, nonlinearity="relu", bidirectional=True),
    "several": Stacked,
}


def some_kept(neurons: NeuronMap) -> Slice:
    """A slice that keeps about 60 % of each group, and the first two neurons."""
    generator = torch.Generator().manual_seed(1)
    kept = {}
    for group in neurons.groups:
        kept[group.name] = torch.rand(group.size, generator=generator) < 0.6
        kept[group.name][:2] = True
    return Slice(kept, neurons.groups)


def assert_removed_equals_masked(
    model: nn.Module, shape: tuple[int, ...]
) -> tuple[NeuronMap, nn.Module]:
    """The neurons that are found, and the smaller model."""
    torch.manual_seed(0)
    model = model.double().eval()
    example, inputs = torch.zeros(2, *shape).double(), torch.randn(3, *shape).double()
    before = fingerprint(model)
    neurons = verified(model, discover(model, example), example)
    assert_unchanged(model, before)
    critical = some_kept(neurons)
    smaller = copy.deepcopy(model)
    remove(smaller, critical, example)
    with torch.no_grad():
        with critical.masked(model):
            masked = model(inputs)
        assert (masked - model(inputs)).abs().max() > 1e-3 * masked.abs().max()
        assert (smaller(inputs) - masked).abs().max() < 1e-12
    left = sum(parameter.numel() for parameter in smaller.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert 1 - critical.compression_rate(model) == pytest.approx(left / whole)
    smaller.train()(inputs).square().sum().backward()
    return neurons, smaller


def found(neurons: NeuronMap, name: str) -> NeuronGroup:
    return next(group for group in neurons.groups if group.name == name)


@pytest.mark.parametrize("name", BETWEEN)
def test_blocks_of_channels_are_neurons(name: str) -> None:
    made, read, between, size = BETWEEN[name]
    neurons, _ = assert_removed_equals_masked(Between(made, read, between), PICTURES)
    assert {group.name: group.size for group in neurons.groups} == {"first": size, "second": 10}


def test_bare_parameters_follow_their_axis() -> None:
    neurons, smaller = assert_removed_equals_masked(Scaled(), PICTURES)
    left = smaller.second.in_channels
    assert smaller.gain.shape == (2 * left, 1, 1)
    assert smaller.position.shape == (1, left, 8, 1)
    assert found(neurons, "first").size == 12


@pytest.mark.parametrize("residual", [True, False])
def test_halves_with_bottlenecks(residual: bool) -> None:
    neurons, _ = assert_removed_equals_masked(C2f(residual), PICTURES)
    halves = found(neurons, "cv1.conv")
    (read,) = (member for member in halves.members if member.name == "cv2.conv")
    # Without residual connections the bottlenecks' outputs are neurons of their own.
    assert len(read.channels) == (32 if residual else 16)
    assert set(neurons.left_alone) == {"head"}


def test_numbers_of_a_half_follow() -> None:
    _, smaller = assert_removed_equals_masked(C2fBySizes(), PICTURES)
    assert smaller.c == smaller.cv1.conv.out_channels / 2 < 8


@pytest.mark.parametrize("unflatten", [None, nn.Unflatten(1, (8, 3, 3))])
def test_vectors_that_become_maps(unflatten: nn.Module | None) -> None:
    neurons, _ = assert_removed_equals_masked(Generator(unflatten), VECTORS)
    (made,) = (member for member in found(neurons, "fc").members if member.name == "fc")
    assert made.channels[made.neurons == 3].tolist() == list(range(27, 36))


@pytest.mark.parametrize("kind", RECURRENT)
def test_hidden_units_are_neurons(kind: str) -> None:
    _, smaller = assert_removed_equals_masked(RECURRENT[kind](), TOKENS)
    layers = [name for name, part in smaller.named_modules() if isinstance(part, nn.RNNBase)]
    for name in layers:
        layer: Any = smaller.get_submodule(name)
        assert layer.weight_hh_l0.shape[1] == layer.hidden_size < 10
        assert layer._flat_weights[0] is layer.weight_ih_l0


def test_hidden_units_that_states_tie_go_together() -> None:
    neurons, _ = assert_removed_equals_masked(Stacked(), TOKENS)
    assert {group.name for group in neurons.groups} == {"first", "start"}
    assert "second" in {member.name for member in found(neurons, "start").members}


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Between(24, 12, lambda maps: maps[:, :12] * maps[:, 12:]), PICTURES),
        (Between(24, 12, lambda maps: maps.split((12, 12), 1)[0]), PICTURES),
        (Between(12, 12, lambda maps: maps.softmax(1)), PICTURES),
    ],
)
def test_what_cannot_follow_is_left_alone(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Fixed numbers of channels in a forward function, and channels that depend on each other."""
    example = torch.randn(2, *shape)
    neurons = verified(model, discover(model, example), example)
    assert [group.name for group in neurons.groups] == ["second"]
    assert "first" in neurons.left_alone


def test_projected_units_are_left_alone() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rec, self.head = nn.LSTM(6, 10, proj_size=4, batch_first=True), nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.rec(tokens)[0][:, -1])

    with pytest.raises((GraphError, NothingToPruneError)):
        discover(Projected(), torch.randn(2, *TOKENS))


class BehindRecurrent(nn.Module):
    """Layers before and behind a recurrent one, which may be given its tokens packed."""

    def __init__(self, rec: nn.RNNBase, packed: bool) -> None:
        super().__init__()
        self.stem, self.rec, self.packed = nn.Linear(6, 9), rec, packed
        self.mid, self.head = nn.Linear(rec.proj_size or rec.hidden_size, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Any = self.stem(tokens).relu()
        if self.packed:
            lengths = torch.arange(len(tokens), 0, -1) + 2
            hidden = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True)
        outputs = self.rec(hidden)[0]
        if self.packed:
            outputs = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)[0]
        return self.head(self.mid(outputs.mean(1)).relu())


@pytest.mark.parametrize(
    ("rec", "packed", "cause"),
    [
        (nn.LSTM(9, 10, proj_size=7, batch_first=True), False, "proj_size"),
        (nn.LSTM(9, 10, batch_first=True), True, "PackedSequence"),
        (nn.GRU(9, 10, batch_first=True), True, "PackedSequence"),
    ],
)
def test_recurrent_layers_that_stay_say_why(rec: nn.RNNBase, packed: bool, cause: str) -> None:
    """The layers behind them are pruned all the same, and none is passed over in silence."""
    neurons, _ = assert_removed_equals_masked(BehindRecurrent(rec, packed), TOKENS)
    assert [group.name for group in neurons.groups] == ["mid"]
    assert neurons.left_alone.keys() == {"stem", "rec", "head"}
    assert cause in neurons.left_alone["rec"]
    assert cause in neurons.left_alone["stem"] or "_pack_padded" in neurons.left_alone["stem"]


class Grouped(nn.Module):
    """A convolution in groups, whose channels may come shuffled."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, groups=3)
        self.last, self.head = nn.Conv2d(12, 8, 1), nn.Linear(8, 4)
        self.between = between

    def forward(self, pictures: Tensor) -> Tensor:
        maps = self.mid(self.between(self.stem(pictures).relu())).relu()
        return self.head(self.last(maps).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "between", [shuffled, nn.ChannelShuffle(3), nn.Identity()], ids=["views", "layer", "none"]
)
def test_channels_shuffled_into_a_grouped_convolution(between: Any) -> None:
    """They are left alone at discovery, before a plan counts on them; in order they go."""
    neurons, _ = assert_removed_equals_masked(Grouped(between), PICTURES)
    names = {group.name for group in neurons.groups}
    if isinstance(between, nn.Identity):
        assert names == {"stem", "mid", "last"}
        return
    assert names == {"mid", "last"}
    example = torch.zeros(2, *PICTURES)
    assert discover(Grouped(between).eval(), example).left_alone == neurons.left_alone
    assert neurons.left_alone["stem"] == "mid ties channels in 3 groups"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: Between(24, 12, gated), PICTURES),
        (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), TOKENS),
        (lambda: Recurrent(nn.GRU, sequence_first=True), TOKENS),
    ],
)
def test_measured_folded_and_within_the_budget(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batches = [(torch.randn(30, *shape), torch.arange(30) % 4) for _ in range(4)]
    pruner = NSSPruner(model, batches[0][0][:2], params_budget=0.6, data=batches, progress=False)
    pruner.step()
    report = pruner.report
    share = report.after.parameters / report.before.parameters
    assert share < 0.61
    assert abs(share - 0.6) < 0.01 or any("the budget is" in note for note in report.notes)
    assert model(batches[0][0]).isfinite().all()


def test_a_criterion_ranks_blocks() -> None:
    """torch-pruning's own sees each value with its gate: the weakest pairs go."""
    tp = pytest.importorskip("torch_pruning")
    model = Between(24, 12, gated)
    weak = torch.tensor([1, 4, 5, 7, 8, 11])
    with torch.no_grad():
        model.first.weight[weak] *= 1e-3
        model.first.weight[weak + 12] *= 1e-3
        model.second.weight[:, weak] *= 1e-3
    pruner = NSSPruner(
        model,
        torch.randn(2, *PICTURES),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        progress=False,
    )
    pruner.step()
    assert pruner.slice.kept["first"].logical_not().nonzero().flatten().tolist() == weak.tolist()
    assert model.first.out_channels == 12


@pytest.mark.parametrize("side", [5, 8])
def test_norms_of_a_class_of_their_own_are_followed(side: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), LayerNorm2d(8), nn.Conv2d(8, 4, 1), nn.Flatten(1, -1))
    model.append(nn.Linear(4 * side * side, 2))
    found = followed(model, torch.randn(1, 3, side, side))
    assert found is not None
    assert reasons_to_stay(found) == {"4": MAKES_THE_OUTPUT}
    group = candidates(found)[0][0]
    assert {(member.name, member.side) for member in group.members} == {
        ("0", "out"),
        ("1", "both"),
        ("2", "in"),
    }
    for member in group.members:
        assert member.channels.tolist() == member.neurons.tolist() == list(range(8))


def test_components_by_hand() -> None:
    edges = [torch.tensor([[1, 4, 2], [2, 5, 3]]), torch.tensor([[7], [5]])]
    assert components(8, edges).tolist() == [0, 1, 1, 1, 4, 4, 6, 4]
