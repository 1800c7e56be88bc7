"""Ridge regression from covariances, with its penalty chosen by the data."""

from __future__ import annotations

import torch
from torch import Tensor

TOO_WIDE = 4  # kept channels for each observation
PENALTIES_PER_DECADE = 4  # values of λ that are tried; more of them change nothing that matters


def ridge(
    *,
    missing: Tensor,
    cross: Tensor,
    known: Tensor,
    gram: Tensor,
    floor: float,
    observations: float,
) -> tuple[Tensor, float] | None:
    """B = cross (known + λI)⁻¹ with the λ that generalised cross-validation prefers.

    Golub, Heath, Wahba (1979), Technometrics 21(2): of n observations and df(λ) effective
    parameters, the error to expect on new data is error(λ) / (1 − (df(λ) + 1) / n)², 1 for the
    mean. Where the kept channels determine the missing ones, λ falls to the rounding error and B
    is exact, which no shrinkage of known alone would give. There must be two observations for
    each effective parameter, whatever cross-validation says, since it is blind beyond.

    Args:
        missing: Covariance of what is to be predicted, ``[targets, targets]``, float64.
        cross: Its covariance with what can be used, ``[targets, kept]``.
        known: Covariance of what can be used, ``[kept, kept]``.
        gram: WᵀW: how much an error weighs at the consumer, ``[targets, targets]``.
        floor: Variance that is rounding error only.
        observations: n.

    Returns:
        B ``[targets, kept]`` and tr(gram · covariance of what remains); None where no λ is
        expected to do better than B = 0, or the kept channels are too many to ask.
    """
    if known.numel() == 0 or len(known) > TOO_WIDE * observations:
        return None
    variances, directions = torch.linalg.eigh(known)
    used = variances > floor
    variances, directions = variances[used], directions[:, used]
    if len(variances) == 0:
        return None
    along = cross @ directions
    explained = (along * (gram @ along)).sum(0)
    total = float((gram * missing).sum())
    residual = max(0.0, total - float((explained / variances).sum()))

    largest, decades = variances[-1], torch.log10(variances[-1] / floor)
    steps = int(PENALTIES_PER_DECADE * decades) + 1
    penalties = largest * 10 ** -torch.linspace(float(decades), 0, steps).to(known)
    shrunk = variances + penalties[:, None]
    parameters = (variances / shrunk).sum(1) + 1
    errors = residual + (explained * penalties[:, None] ** 2 / (variances * shrunk**2)).sum(1)
    expected = errors / (1 - parameters / observations) ** 2
    expected[parameters > observations / 2] = torch.inf
    best = int(expected.argmin())
    if observations <= 1 or not expected[best] < total / (1 - 1 / observations) ** 2:
        return None
    return along / shrunk[best] @ directions.T, float(errors[best])


def solve_ridge(known: Tensor, cross: Tensor, penalty: float | Tensor) -> Tensor:
    """B = cross (known + λI)⁻¹ with a given λ, ``[targets, kept]``.

    Args:
        known: Covariance of what can be used, ``[kept, kept]``, float64.
        cross: Covariance of the targets with it, ``[targets, kept]``.
        penalty: λ, large enough that known + λI is positive definite.
    """
    shifted = known + penalty * torch.eye(len(known), dtype=known.dtype, device=known.device)
    return torch.cholesky_solve(cross.T, torch.linalg.cholesky(shifted)).T
