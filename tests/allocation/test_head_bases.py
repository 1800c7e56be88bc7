"""Coordinates of heads, and what their dimensions cost, by naive sums and derivatives."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

from nss_prune.allocation.effects import measured
from nss_prune.allocation.head_bases import Sums, canonical, last_first, principal
from nss_prune.core.draws import Draws
from nss_prune.core.outputs import outputs_of
from nss_prune.discovery.head_dimensions import with_head_dimensions
from nss_prune.discovery.whole import discover

HEADS, WIDTH, ROWS = 2, 5, 40
EXACT = 2.3e-16


def rows(seed: int) -> Tensor:
    """Correlated values of each head, ``[rows, heads, d]``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ROWS, HEADS, WIDTH, generator=generator).double()
    mixing = torch.randn(HEADS, WIDTH, WIDTH, generator=generator).double()
    return torch.einsum("nhi,hij->nhj", values, mixing) + 0.3


def test_sums_are_weighted_moments() -> None:
    values, weights = rows(0), rows(1)[:, :, 0].abs()
    sums = Sums()
    for part in (slice(0, 11), slice(11, ROWS)):
        sums.add(values[part], weights[part])
    for centred in (False, True):
        for head in range(HEADS):
            total = weights[:, head].sum()
            mean = sum(weights[n, head] * values[n, head] for n in range(ROWS)) / total
            wanted = torch.zeros(WIDTH, WIDTH).double()
            for n in range(ROWS):
                x = values[n, head] - (mean if centred else 0)
                wanted += weights[n, head] * torch.outer(x, x) / total
            assert torch.allclose(sums.moments(centred=centred)[head], wanted, atol=1e-12)


def lost(q: Tensor, k: Tensor, product: Tensor) -> float:
    """Mean of (qᵀk − qᵀ P k)² over all pairs."""
    pairs = [float((a @ b - a @ product @ b) ** 2) for a in q for b in k]
    return sum(pairs) / len(pairs)


def test_the_first_dimensions_are_the_best_of_their_number() -> None:
    q, k = rows(2), rows(3)
    k = k - k.mean(0)
    moments = [torch.einsum("nhi,nhj->hij", x, x) / ROWS for x in (q, k)]
    changes = canonical(moments[0], moments[1], EXACT)
    for head in range(HEADS):
        a = changes[head]
        b = torch.linalg.inv(a).T
        roots = [torch.linalg.cholesky(moment[head]) for moment in moments]
        sizes = torch.linalg.svdvals(roots[0].T @ roots[1])
        for r in range(1, WIDTH):
            kept = torch.diag((torch.arange(WIDTH) < r).double())
            found = lost(q[:, head], k[:, head], a.T @ kept @ b)
            assert found == pytest.approx(float(sizes[r:].square().sum()), rel=1e-6)


def test_values_lose_the_smallest_eigenvalues() -> None:
    x, g = rows(4), rows(5)
    x = x - x.mean(0)
    values, information = (torch.einsum("nhi,nhj->hij", y, y) / ROWS for y in (x, g))
    changes = principal(values, information, EXACT)
    for head in range(HEADS):
        turn, back = changes[head], torch.linalg.inv(changes[head])
        sizes = torch.linalg.eigvals(values[head] @ information[head]).real.sort().values.flip(0)
        for r in range(1, WIDTH):
            gone = back @ torch.diag((torch.arange(WIDTH) >= r).double()) @ turn
            error = gone @ values[head] @ gone.T
            found = float((information[head] * error).sum())
            assert found == pytest.approx(float(sizes[r:].sum()), rel=1e-6)


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 8)
        self.attn = Attention(8, HEADS, qkv_bias=True)
        self.head = nn.Linear(8, 4)
        self.share = torch.zeros(())
        self.gone = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.attn(x)).mean(1))

    def shrunk(self, x: Tensor, share: Tensor, gone: int) -> Tensor:
        """With a share of the last dimensions gone, by the formula of attention."""
        x = self.stem(x)
        q, k, v = self.attn.qkv(x).unflatten(-1, (3, HEADS, 4)).permute(2, 0, 3, 1, 4)
        factor = 1 - share * (torch.arange(4) >= 4 - gone)
        scores = (q * factor) @ k.transpose(-2, -1) / 2
        read = (scores.softmax(-1) @ v) * factor
        read = read.transpose(1, 2).flatten(2)
        return self.head((x + self.attn.proj(read)).mean(1))


def test_measured_effects_are_derivatives() -> None:
    torch.manual_seed(0)
    model = Classifier().double().eval()
    inputs = torch.randn(110, 6, 3).double()
    data = [(inputs, torch.arange(110) % 4)]
    outputs = outputs_of(model, data)
    neurons = with_head_dimensions(model, discover(model, inputs), inputs)
    (group,) = (group for group in neurons.groups if group.is_inside_heads)
    found = measured(model, data, (group,), {group.name: last_first(group)}, None, outputs=outputs)[
        group.name
    ]
    assert found.order.tolist() == [3, 2, 1, 0]
    for gone in (1, 2, 3):
        shares = torch.zeros(110, requires_grad=True, dtype=torch.float64)
        given = torch.func.vmap(lambda x, t, n=gone: model.shrunk(x[None], t, n)[0])(inputs, shares)
        loss = outputs.drawn_loss(given, Draws(inputs, 0))
        (slope,) = torch.autograd.grad(loss, shares)
        wanted = float(slope.square().mean() / 2)
        assert float(found.divergence[gone - 1]) == pytest.approx(wanted, rel=1e-4)
