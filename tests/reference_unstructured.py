"""Naive oracles of the unstructured passes, in float64 and plain loops, and small nets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def ranked(scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(layer, flat index) of all survivors, best first; ties by layer, then by flat index."""
    order = sorted(
        (-value, layer, index)
        for layer, (score, mask) in enumerate(zip(scores, masks, strict=True))
        for index, (value, alive) in enumerate(
            zip(score.flatten().tolist(), mask.flatten().tolist(), strict=True)
        )
        if alive
    )
    return [(layer, index) for _, layer, index in order]


def kept_by_score(scores: Sequence[Tensor], masks: Sequence[Tensor], keep: int) -> list[Tensor]:
    """The `keep` best survivors over all layers."""
    kept = [torch.zeros_like(mask) for mask in masks]
    for layer, index in ranked(scores, masks)[:keep]:
        kept[layer].view(-1)[index] = True
    return kept


def lamp_scores(weight: Tensor, mask: Tensor) -> Tensor:
    """w² / sum of the survivors' w² that are not smaller, equal ones by position; 0 for zeros."""
    flat = weight.detach().double().flatten().numpy()
    alive = mask.flatten().numpy()
    score = np.zeros(len(flat))
    energy = 0.0
    for index in np.lexsort((np.arange(len(flat)), -np.abs(flat))):
        if alive[index] and flat[index] != 0:
            energy += flat[index] ** 2
            score[index] = flat[index] ** 2 / energy
    return torch.from_numpy(score).view(weight.shape)


def magnitudes(weight: Tensor, mask: Tensor) -> Tensor:
    return weight.detach().double().abs()


def largest(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """The `count` largest |w| of one layer, equal ones by position."""
    return kept_by_score([magnitudes(weight, mask)], [mask], count)[0]


def erk_budgets(shapes: Sequence[tuple[int, ...]], left: Sequence[int], keep: int) -> list[float]:
    """Survivors ∝ sum of dimensions; the layer furthest above 100 % made dense, again and again."""
    dense: list[int] = []
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        budget = keep - sum(left[i] for i in dense)
        scale = budget / sum(sum(shapes[i]) for i in free)
        worst = max(free, key=lambda i: sum(shapes[i]) / left[i])
        if scale * sum(shapes[worst]) <= left[worst]:
            return [left[i] if i in dense else scale * sum(shapes[i]) for i in range(len(shapes))]
        dense.append(worst)


def uniform_plus_budgets(
    sizes: Sequence[int], left: Sequence[int], keep: int, first_is_convolution: bool
) -> list[float]:
    """One share for all; the first dense if a convolution; the last at least at 20 %."""
    fixed = {0: float(left[0])} if first_is_convolution else {}
    for _ in range(2):
        free = [i for i in range(len(sizes)) if i not in fixed]
        share = (keep - sum(fixed.values())) / sum(left[i] for i in free)
        budgets = [fixed.get(i, share * left[i]) for i in range(len(sizes))]
        if budgets[-1] < 0.2 * sizes[-1]:
            fixed[len(sizes) - 1] = min(float(left[-1]), float(np.ceil(0.2 * sizes[-1])))
    return budgets


class Tied(nn.Module):
    """An embedding, two Linear layers and a head; head and embedding, both layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.two.weight = self.one.weight
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.embedding(tokens)).relu()).relu())


class Reader(nn.Module):
    """Reads its children's weights without calling the children."""

    def __init__(self) -> None:
        super().__init__()
        self.direct = nn.Linear(6, 5)
        self.listed = nn.ModuleList([nn.Linear(5, 4)])
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.linear(inputs, self.direct.weight).relu()
        hidden = nn.functional.linear(hidden, self.listed[0].weight)
        return self.attention(hidden, hidden, hidden)[0]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 15), nn.Linear(15, 4))


def convolutional() -> nn.Sequential:
    """Every kind of convolution: plain, grouped, transposed, 1d and 3d."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ConvTranspose2d(8, 6, 2),
        nn.Conv1d(6, 9, 3),
        nn.Conv3d(9, 4, (1, 2, 3)),
        nn.Linear(4, 10),
    )


def fresh(make=perceptron, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, in their order."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_it_was(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit-identical, NaN included, with the same names in the same order and no masks."""
    now = model.state_dict()
    assert list(now) == list(before)
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0, equal_nan=True)
    assert not prune.is_pruned(model)


def registered_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of the modules themselves, by qualified name of the module."""
    return {
        name.removesuffix("weight_mask").removesuffix("."): mask.clone()
        for name, mask in model.named_buffers()
        if name.endswith("weight_mask")
    }
