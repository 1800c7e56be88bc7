"""The divergence that is predicted for several layers, against changes made one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from networks import mlp
from nss_prune import NSSPruner
from nss_prune.allocation.effects import measured
from nss_prune.allocation.elimination import Elimination
from nss_prune.allocation.interactions import Interactions, Predictor
from nss_prune.core.draws import Draws
from nss_prune.core.outputs import outputs_of
from nss_prune.discovery.whole import discover
from nss_prune.graph.slices import Slice

SAMPLES = 130


def made() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(3)
    return mlp(6, (9, 8, 7), 4).eval(), torch.randn(SAMPLES, 6).double()


def naive_effects(model: nn.Sequential, x: Tensor, order: dict[str, Tensor], seed: int):
    """layer -> neurons gone -> e of each sample, from one gradient of the drawn loss."""
    consumers = {"1": 3, "3": 5, "5": 7}
    reads, activation = {}, x
    for position, layer in enumerate(model):
        for name, consumer in consumers.items():
            if position == consumer:
                reads[name] = activation
                activation.retain_grad()
        activation = layer(activation)
    outputs = outputs_of(model, [(x.detach(), None)])
    outputs.drawn_loss(activation, Draws(x.detach(), seed)).backward()
    return {
        name: {
            count: -(read.grad[:, gone] * read.detach()[:, gone]).sum(1)
            for count in range(1, len(order[name]))
            for gone in [order[name][:count]]
        }
        for name, read in reads.items()
    }


def test_it_is_the_mean_square_of_the_sum_of_all_effects() -> None:
    """½ E[(Σ e)²] sample by sample; nothing is folded, so that e = -Σ g x of what goes."""
    model, x = made()
    groups = discover(model, x[:2]).groups
    nothing = {
        g.name: Elimination(torch.randperm(g.size), torch.zeros(g.size).double()) for g in groups
    }
    together = Interactions()
    data = [(x[:60], None), (x[60:], None)]
    found = measured(model, data, groups, nothing, None, seed=5, interactions=together)
    order = {name: elimination.order for name, elimination in nothing.items()}
    effects = naive_effects(model, x.clone().requires_grad_(), order, 5)
    predictor = Predictor(found, together)
    generator = torch.Generator().manual_seed(0)
    checked = 0
    for _ in range(40):
        gone = {g.name: int(torch.randint(1, g.size, (), generator=generator)) for g in groups}
        if not all(counts_as_measured(found[n], effects[n], count) for n, count in gone.items()):
            continue  # D never falls as more neurons go, so that it may be above what was measured
        total = sum(effects[name][count] for name, count in gone.items())
        expected = float(sum(float(e) ** 2 for e in total)) / SAMPLES / 2
        got = predictor.divergence({name: torch.tensor([count]) for name, count in gone.items()})
        assert float(got) == pytest.approx(expected, rel=1e-9)
        kept = {
            name: torch.ones(len(order[name]), dtype=torch.bool).index_fill(
                0, order[name][:count], False
            )
            for name, count in gone.items()
        }
        assert predictor.of(Slice(kept, groups)) == pytest.approx(expected, rel=1e-9)
        checked += 1
    assert checked >= 10


def counts_as_measured(found: Elimination, effects: dict[int, Tensor], count: int) -> bool:
    alone = float(effects[count].square().mean()) / 2
    return float(found.divergence[count - 1]) == pytest.approx(alone, rel=1e-9)


def test_correlations_are_measured_and_sizes_predicted() -> None:
    """D = Σ D_l + Σ_{l≠m} ρ √(D_l D_m), by loops over the pairs."""
    torch.manual_seed(1)
    counts = {"a": torch.tensor([2, 4]), "b": torch.tensor([1, 3]), "c": torch.tensor([2])}
    root = torch.randn(5, 9).double()
    products = root @ root.T
    found = {
        name: Elimination(torch.arange(5), torch.rand(5).double().cumsum(0) * 9) for name in counts
    }
    together = Interactions()
    together.add(counts, products)
    place = {("a", 2): 0, ("a", 4): 1, ("b", 1): 2, ("b", 3): 3, ("c", 2): 4}
    gone = {"a": 4, "b": 1, "c": 2}
    expected = 0.0
    for first, n in gone.items():
        for second, m in gone.items():
            i, j = place[first, n], place[second, m]
            correlation = products[i, j] / (products[i, i] * products[j, j]).sqrt()
            sizes = found[first].divergence[n - 1] * found[second].divergence[m - 1]
            expected += float(correlation * sizes.sqrt())
    predictor = Predictor(found, together)
    got = predictor.divergence({name: torch.tensor([n, 0]) for name, n in gone.items()})
    assert got.tolist() == [pytest.approx(expected), 0.0]
    for name, elimination in found.items():  # alone, each is as it was
        torch.testing.assert_close(predictor.table(name)[1:], elimination.divergence)
    alone = Predictor(found)
    added = alone.divergence({name: torch.tensor([n]) for name, n in gone.items()})
    assert float(added) == pytest.approx(
        sum(float(found[name].divergence[n - 1]) for name, n in gone.items())
    )
    assert predictor.has_cross_terms
    assert not alone.has_cross_terms


def test_a_budget_says_how_sensitive_the_layers_are() -> None:
    model, x = made()
    pruner = NSSPruner(model, x[:2], data=[(x, x.long()[:, 0] % 4)], macs_budget=0.6)
    table = pruner.sensitivity
    predictor = pruner.evidence.predictor
    assert list(table.layers) == ["1", "3", "5"]
    for name, values in table.layers.items():
        size = len(pruner.slice.kept[name])
        for share, value in zip(table.shares, values, strict=True):
            count = min(round(share * size), size - 1)
            alone = predictor.divergence({name: torch.tensor([count])})
            assert value == pytest.approx(float(alone))
        assert list(values) == sorted(values)
    shares = [share for share, _ in table.curve]
    assert table.curve[0] == (1.0, 0.0)
    assert shares == sorted(shares, reverse=True)
    plain = table.to_lists()
    assert plain["curve"] == [list(point) for point in table.curve]
    assert plain["layers"]["3"] == list(table.layers["3"])
    assert plain["cost"] == "MACs"
    assert plain["together"]
    assert all(word in str(table) for word in ("nats", "MACs", "90%", "\n3 "))
    pruner.step()
    assert pruner.sensitivity == table
