"""Solve a consumer's least-squares problem: new weights and what they leave unexplained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nss_prune.compensation.constant import as_weight, by_channel_group, constant_output
from nss_prune.compensation.problem import Problem
from nss_prune.compensation.ridge import ridge
from nss_prune.statistics.covariance import add_products
from nss_prune.statistics.moments import ConsumerStatistics

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class ConsumerFold:
    """How one consumer changes.

    Attributes:
        weight: The new weight of the still unpruned consumer; None where it stays.
        mixing: What it reads additionally, of what it reads: B of every channel group, float64
            ``[channel groups, units, units]``, zero but in the rows that go and the columns that
            stay; None where the weight stays. Units as in :class:`Problem`.
        constant: What is added to its output, float64 ``[outputs]``; None where nothing is.
        norm: The BatchNorm that takes the constant where the consumer has no bias, or None.
        errors: E‖Δy‖² / E‖y‖² of its output y on the statistics, without folding and with it.
            Between the positions of a kernel no covariance is known: their errors add up.
        note: Why it was not folded, or only in part; "" where it was.
    """

    weight: Tensor | None = None
    mixing: Tensor | None = None
    constant: Tensor | None = None
    norm: str | None = None
    errors: tuple[float, float] | None = None
    note: str = ""


def solved(name: str, module: nn.Module, problem: Problem) -> ConsumerFold:
    """How a consumer changes so that it misses as little as can be."""
    shape = problem.source.shape
    weight = by_channel_group(module, problem.whole_mean.shape[1])
    parts = problem.split(len(weight))
    grams = [_gram(part) for part in weight]
    pairs = list(zip(parts, grams, strict=True))
    power = sum(_weighted(part.whole, gram) for part, gram in pairs)
    power += constant_output(module, shape, problem.whole_mean).power
    missed = sum(_weighted(part.missing, gram, part.targets[-1]) for part, gram in pairs)
    alone = constant_output(module, shape, problem.missing_mean)
    noise = EPSILON * power * len(problem.kept)
    if missed + alone.power <= noise:
        return ConsumerFold(errors=(0.0, 0.0))

    before = (missed + alone.power) / power
    mixings = [_mixing(part, gram, noise) for part, gram in pairs]
    mixed_missed = sum(mixing.missed for mixing in mixings)
    guesses = [m.matrix @ part.known_mean for m, part in zip(mixings, parts, strict=True)]
    with_mixing = constant_output(module, shape, problem.missing_mean - torch.cat(guesses))
    note = "; ".join(dict.fromkeys(mixing.note for mixing in mixings if mixing.note))
    note = f"{name}: {note}" if note else ""
    # Only where it pads: elsewhere the ridge never does worse than the means alone.
    worse = mixed_missed + with_mixing.uneven > missed + alone.uneven
    constant = alone if worse else with_mixing
    after = (missed if worse else mixed_missed) + constant.uneven
    new = matrices = None
    if not worse and any(mixing.matrix.any() for mixing in mixings):
        matrices = torch.stack([mixing.matrix for mixing in mixings])
        mixed = weight + torch.einsum("gouk,guv->govk", weight, matrices)
        new = as_weight(mixed, module).to(module.weight)  # type: ignore[arg-type]
    return ConsumerFold(
        weight=new,
        mixing=matrices,
        constant=constant.average if constant.average.square().sum() > noise else None,
        norm=problem.source.norm,
        errors=(before, after / power),
        note=note,
    )


@dataclass(frozen=True)
class Mixing:
    """B of one channel group.

    Attributes:
        matrix: ``[units, units]``, zero but in the rows missed and the columns kept.
        missed: E‖W (z − B x̃)‖² of what is missed z, centred.
        note: Why it is zero, or "".
    """

    matrix: Tensor
    missed: float
    note: str = ""


def _mixing(problem: Problem, gram: Tensor, noise: float) -> Mixing:
    matrix = torch.zeros_like(gram)
    kept = problem.kept.nonzero().flatten()
    known = problem.known[kept][:, kept]
    squares = known.diagonal() + problem.known_mean[kept].square().mean(1)
    floor = EPSILON * len(kept) * float(squares.max()) if len(kept) else 0.0
    left = 0.0
    for targets in problem.targets:
        missing, cross = _still_missed(problem, matrix)
        left = _weighted(missing, gram, targets)
        if left <= noise:
            continue
        target = targets.nonzero().flatten()
        found = ridge(
            missing=missing[target][:, target],
            cross=cross[target][:, kept],
            known=known,
            gram=gram[target][:, target],
            floor=floor,
            observations=problem.source.observations,
        )
        if found is not None:
            solution, left = found
            matrix[target[:, None], kept] += solution
    if left > noise and not matrix.any():
        return Mixing(matrix, left, _why_only_means(problem.source, len(kept)))
    return Mixing(matrix, left)


def _still_missed(problem: Problem, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of z − B x̃ for a B, and its covariance with x̃."""
    if not matrix.any():
        return problem.missing, problem.cross
    explained = matrix @ problem.cross.T
    known = matrix @ problem.known
    return problem.missing - explained - explained.T + known @ matrix.T, problem.cross - known


def _why_only_means(source: ConsumerStatistics, kept: int) -> str:
    worth = f"{source.samples} samples (worth {source.observations:.0f} independent observations)"
    if source.observations < 2 * (kept + 1):
        return f"{worth} are too few for its {kept} kept channels: only means are folded"
    return f"its {kept} kept channels do not predict the others in {worth}: only means are folded"


def _weighted(covariance: Tensor, gram: Tensor, units: Tensor | None = None) -> float:
    """tr(gram · covariance) over some units: the variance that a consumer makes of it."""
    product = gram * covariance
    if units is not None:
        return max(0.0, float(units.to(product) @ product @ units.to(product)))
    return max(0.0, float(product.sum()))


def _gram(weight: Tensor) -> Tensor:
    """Σ w wᵀ over the outputs and the kernel of ``[outputs, units, kernel positions]``."""
    gram = weight.new_zeros(weight.shape[1], weight.shape[1])
    add_products(gram, weight.transpose(0, 1).flatten(1))
    return gram
