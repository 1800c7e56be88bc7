"""Which share of the cost a model keeps at which step of a training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from nss_prune.errors import ArgumentError


def cubic_schedule(final: float, *, begin: int, end: int, times: int) -> dict[int, float]:
    """Shares that fall fast at first and slowly in the end (Zhu and Gupta 2017, Eq. 1).

    k_t = k_f + (1 − k_f) (1 − (t − t_0) / (t_n − t_0))³ at evenly spaced steps t after t_0, up to
    t_n.

    Args:
        final: Share k_f of the cost that is kept in the end, in (0, 1).
        begin: t_0, the step before the first removal, 0 or more.
        end: t_n, the step of the last one.
        times: How many removals there are.

    Returns:
        Step -> share to keep.

    Raises:
        ArgumentError: One is outside what it may be.
    """
    if not 0 < final < 1:
        raise ArgumentError(f"final is {final}; give a share to keep in (0, 1)")
    if times < 1 or begin < 0 or end - begin < times:
        raise ArgumentError(
            f"begin is {begin}, end {end}, times {times}; give 0 <= begin and at least {times} "
            "steps up to end, with times of 1 or more"
        )
    found = {}
    for number in range(1, times + 1):
        done = number / times
        step = begin + round(done * (end - begin))
        found[step] = final + (1 - final) * (1 - done) ** 3
    return found


def checked_schedule(budgets: Mapping[int, float]) -> dict[int, float]:
    """A schedule in the order of its steps.

    Raises:
        ArgumentError: It is empty, a share is not in (0, 1), or the shares do not fall.
    """
    ordered = dict(sorted(budgets.items()))
    shares = list(ordered.values())
    falls = all(later < earlier for earlier, later in itertools.pairwise(shares))
    if not shares or not falls or not all(0 < share < 1 for share in shares):
        raise ArgumentError(
            f"budgets is {dict(budgets)}; give step -> share to keep, in (0, 1), falling from step "
            "to step, such as cubic_schedule(0.5, begin=100, end=1000, times=5)"
        )
    return ordered
