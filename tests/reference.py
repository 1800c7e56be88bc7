"""Naive float64 oracles: the definitions, written as loops."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def landscape_similarity(subset: Tensor, whole: Tensor) -> float:
    """Paper, Eq. 1 and 2: rows are observations, columns are neurons."""
    first, second = subset @ subset.T, whole @ whole.T
    norms = first.norm() * second.norm()
    return 1.0 if norms == 0 else float((first * second).sum() / norms)


def algorithm_1(
    activations: Tensor, contributions: Tensor, theta: float, interval: int = 1
) -> set[int]:
    """Paper, Algorithm 1, with centred activations ``[observations, neurons]``."""
    centred = activations - activations.mean(0)
    order = sorted(range(len(contributions)), key=lambda n: (-float(contributions[n]), n))
    chosen: list[int] = []
    while len(chosen) < len(order):
        chosen = order[: len(chosen) + interval]
        if landscape_similarity(centred[:, chosen], centred) >= theta:
            break
    return set(chosen)


def taylor(model: nn.Sequential, consumer: int, inputs: Tensor, labels: Tensor) -> Tensor:
    """mean_x (Σ a ∂L/∂a)² for what layer ``consumer`` of a sequence reads, sample by sample."""
    squares = []
    for sample, label in zip(inputs, labels, strict=True):
        activation = model[:consumer](sample[None]).detach().requires_grad_()
        loss = nn.functional.cross_entropy(model[consumer:](activation), label[None])
        (gradient,) = torch.autograd.grad(loss, activation)
        products = (activation * gradient)[0]
        squares.append(products.reshape(len(products), -1).sum(1) ** 2)
    return torch.stack(squares).mean(0).detach()
