"""The paper to the letter: all pairs of a category's samples, and ranks of signed contributions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_streaming import in_two_processes, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from networks import batches, cnn, mlp
from nss_prune import PAPER, NSSImportance, Profile, profile
from nss_prune.errors import ArgumentError, DataError, ModelMismatchError
from nss_prune.profiling import flat
from nss_prune.profiling.flat import DrawnSamples, landscape_kernel
from reference import landscape_similarity

FLAT = {"features": "flat", "centered": True, "positions": None}


def rectangular() -> nn.Sequential:
    """Maps of 5 x 9 that one convolution reads, and pooled ones."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Conv2d(7, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).double().eval()  # fmt: skip


class TwoConsumers(nn.Module):
    """Neurons that two layers read, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 9)
        self.one, self.other = nn.Linear(9, 4), nn.Linear(9, 4)

    def hidden(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = self.first(inputs)
        return found.relu(), found.square()

    def forward(self, inputs: Tensor) -> Tensor:
        positive, square = self.hidden(inputs)
        return self.one(positive) + self.other(positive) + self.one(square)


def expected_curve(read: Tensor, order: Tensor, centered: bool) -> list[float]:
    """Eq. 1 and 2 for every prefix of the order, of ``[samples, neurons, features]``."""
    if centered:
        read = read - read.mean(0)
    whole = read.flatten(1)
    return [
        landscape_similarity(read[:, order[:k]].flatten(1), whole) for k in range(1, len(order) + 1)
    ]


@pytest.mark.parametrize("size", [1, 2, 7, 16, 40])
@pytest.mark.parametrize("centered", [True, False])
def test_every_batch_size_gives_equation_1(size: int, centered: bool) -> None:
    torch.manual_seed(0)
    model, shape = rectangular(), (3, 7, 11)
    data = batches(40, shape, 2, size=size)
    result = profile(model, data, metrics=("avg",), **{**FLAT, "centered": centered})
    inputs, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    for layer, consumer in ((0, 2), (2, 6)):
        read = model[:consumer](inputs).detach()
        read = read.reshape(len(read), read.shape[1], -1)
        for category in range(2):
            order = result.ranking("avg", str(layer))[category]
            expected = expected_curve(read[labels == category], order, centered)
            found = result.curves["avg"][str(layer)][category].tolist()
            assert found == pytest.approx(expected, abs=1e-12)
    assert result.notes == ()


@pytest.mark.parametrize("size", [3, 30])
def test_several_consumers_add_to_the_features(size: int) -> None:
    torch.manual_seed(0)
    model = TwoConsumers().double()
    data = batches(30, (12,), 1, size=size)
    result = profile(model, data, **PAPER)
    inputs = torch.cat([inputs for inputs, _ in data])
    positive, square = model.hidden(inputs)
    read = torch.stack([positive, positive, square], dim=2).detach()
    order = result.ranking("taylor", "first")[0]
    expected = expected_curve(read, order, centered=False)
    assert result.curves["taylor"]["first"][0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(5, 30, 3), (5, 6, 8), (4, 9, 1), (3, 1, 5)])
@pytest.mark.parametrize("block", [1, 40, 2**24])
def test_both_ways_to_the_kernel(shape, block: int, monkeypatch) -> None:
    monkeypatch.setattr(flat, "BLOCK", block)
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()
    grams = [each @ each.T for each in values]
    expected = [[float((a * b).sum()) for b in grams] for a in grams]
    torch.testing.assert_close(landscape_kernel(values), torch.tensor(expected).double())


def test_merged_shards_compare_pairs_across_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = rectangular(), batches(48, (3, 7, 11), 3, size=8)
    for arguments in (PAPER, FLAT):
        whole = profile(model, data, **arguments)
        shards = [
            profile(model, shard, **arguments, keep_statistics=True)
            for shard in (data[:1], data[1:4], data[4:])
        ]
        shards[1].save(tmp_path / "shard.safetensors", statistics=True)
        shards[1] = Profile.load(tmp_path / "shard.safetensors")
        merged = Profile.merge(shards)
        same(whole, merged)
        assert merged.ranked_by == whole.ranked_by
        assert merged.used == 48


def test_several_passes_and_the_order_of_categories_give_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, (1, 2)), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    data = batches(48, (3, 1, 2), 3, size=7)
    dataset = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    one = profile(model, data, **PAPER)
    limit = 2 * (12 * (64**2 + 4**2) + 1)  # half of it has room for the sums of one category
    assert limit / 2 > 48 * 64 * 2 * 8 / 2  # and for the activations of two
    assert one.notes == ()
    same(one, profile(model, data, **PAPER, memory_limit=limit))
    same(one, profile(model, DataLoader(dataset, batch_size=10), **PAPER, memory_limit=limit))


def test_two_processes_compare_pairs_across_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = rectangular(), batches(53, (3, 7, 11), 3, size=53)
    data[0][1][:5] = -100  # these are not used, and counted together as well
    one = profile(model, data, **PAPER)
    assert (one.used, one.unused) == (48, 5)
    for (found,) in in_two_processes(model, TensorDataset(*data[0]), tmp_path, PAPER):
        same(one, found)
        assert (found.used, found.unused) == (48, 5)


def activations(samples: int) -> Tensor:
    return torch.randn(4, samples, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [1, 9, 200])
def test_a_draw_is_even_and_the_same_for_every_batch_size(size: int) -> None:
    values = activations(200)
    drawn = DrawnSamples()
    for part in values.split(size, dim=1):
        drawn.add([part])
    drawn.keep(50)
    assert drawn.seen == 200
    assert drawn.values.shape == (4, 50, 6)
    kept = [(values == sample[:, None]).all(2).all(0).nonzero().item()
            for sample in drawn.values.unbind(1)]  # fmt: skip
    assert all(8 <= sum(start <= index < start + 40 for index in kept) <= 12
               for start in range(0, 200, 40))  # fmt: skip
    whole = DrawnSamples()
    whole.add([values])
    whole.keep(50)
    assert torch.equal(whole.values, drawn.values)


def test_samples_that_come_after_a_draw_have_the_same_chance() -> None:
    drawn = DrawnSamples()
    values = activations(400)
    for part in values.split(10, dim=1):
        drawn.add([part])
        drawn.keep(40)
    late = (values[:, 200:, None] == drawn.values[:, None]).all(3).all(0).any(1).sum()
    assert 36 <= drawn.values.shape[1] <= 40
    assert 14 <= int(late) <= 26


def test_a_drawn_similarity_is_near_that_of_all() -> None:
    torch.manual_seed(0)
    model, data = rectangular(), batches(400, (3, 7, 11), 2, size=16)
    whole = profile(model, data, **PAPER)
    per_sample = 8 * (7 * 45 + 6)
    part = profile(model, data, **PAPER, memory_limit=2 * 100 * per_sample)
    assert whole.notes == ()
    assert "of 200 of category 0" in part.notes[0]
    for name in whole.layers:
        torch.testing.assert_close(
            whole.curves["taylor"][name], part.curves["taylor"][name], rtol=0, atol=0.05
        )
    with pytest.raises(DataError, match="memory_limit"):
        profile(model, data, **PAPER, memory_limit=6 * per_sample)


def test_maps_of_several_sizes_are_refused_in_words() -> None:
    torch.manual_seed(0)
    model = rectangular()
    data = [
        (torch.randn(8, 3, side, side).double(), torch.zeros(8, dtype=torch.long))
        for side in (8, 10)
    ]
    with pytest.raises(DataError, match="positions"):
        profile(model, data, **PAPER)
    profile(model, data)


# --- signed ranks --------------------------------------------------------------------------------


@pytest.fixture
def negative() -> nn.Sequential:
    """Neurons 0 to 2 average -3, 1 and -1: layers without an activation function."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        model[0].bias.copy_(torch.tensor([-3.0, 1, -1]))
    return model


def centred_data() -> list[tuple[Tensor, Tensor]]:
    inputs = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]] * 8).double()
    return [(inputs, torch.arange(32) // 16)]


def test_ranks_by_magnitude_and_by_sign(negative, tmp_path: Path) -> None:
    for ranking, order in (("magnitude", [0, 1, 2]), ("signed", [1, 2, 0])):
        found = profile(negative, centred_data(), metrics=("avg",), ranking=ranking)
        assert found.overall["avg"]["0"].tolist() == pytest.approx([-3, 1, -1])
        assert found.ranking("avg", "0").tolist() == [order, order]
        found.save(tmp_path / "profile.safetensors")
        loaded = Profile.load(tmp_path / "profile.safetensors")
        assert loaded.ranked_by == ranking
        for one in (found, loaded):
            for strategy in ("category", "global"):
                kept = one.slice(ratio=0.3, strategy=strategy).kept["0"]
                assert kept.nonzero().flatten().tolist() == order[:1]
            # The similarity never falls here, so that the first neurons of the order are critical.
            curve = one.curves["avg"]["0"][0]
            count = next(k for k in range(3) if curve[k] >= 0.9) + 1
            assert set(one.slice(0.9).kept["0"].nonzero().flatten().tolist()) == set(order[:count])
    assert PAPER["ranking"] == "signed"


def test_ties_of_the_importance_follow_the_ranking(negative) -> None:
    # Neurons 0 and 1 explain the layer together, so that what comes after both has threshold 1.
    with torch.no_grad():
        negative[0].weight[1:] = 0
    for ranking, better in (("magnitude", 2), ("signed", 1)):
        with torch.no_grad():
            negative[0].bias.copy_(torch.tensor([9.0, 1, -2]))
        found = profile(negative, centred_data(), metrics=("avg",), ranking=ranking)
        scores = NSSImportance(found).scores["0"]
        assert scores.argmax() == 0
        assert scores[1:].argmax() + 1 == better


def test_other_rankings_are_refused_and_not_merged(negative) -> None:
    with pytest.raises(ArgumentError, match="magnitude"):
        profile(negative, centred_data(), ranking="absolute")
    shards = [
        profile(negative, centred_data(), ranking=ranking, keep_statistics=True)
        for ranking in ("magnitude", "signed")
    ]
    with pytest.raises(ModelMismatchError, match="ranking"):
        Profile.merge(shards)


def test_dense_layers_need_no_activations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = mlp(), batches(48, (12,), 3, size=5)
    found = profile(model, data, **PAPER, keep_statistics=True)
    assert all(
        group.landscape.drawn is None
        for sums in found.statistics.sums.values()
        for group in sums.groups.values()
    )
    model, data = cnn().eval(), batches(48, (3, 12, 12), 3, size=5)
    found = profile(model, data, **PAPER, keep_statistics=True)
    assert found.statistics.sums[0].groups["0"].landscape.drawn.values.shape == (8, 16, 36)
