"""The repairs that the arguments of NSSPruner ask for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from nss_prune.pruner.arguments import Aim, check_fold, check_repairs, check_repeatable
from nss_prune.pruner.balancing import Balance
from nss_prune.pruner.folding import Fold
from nss_prune.pruner.recalibrating import Recalibrate, recalibrates
from nss_prune.pruner.refitting import Refit
from nss_prune.pruner.repair import Repair
from nss_prune.pruner.upkeep import Upkeep


def repairs_for(
    data: Iterable[Any] | None,
    fold: bool | str,
    recalibrate: bool | None,
    balance: bool,
    more: Iterable[Repair],
    outputs: Any,
    upkeep: Upkeep,
    aim: Aim,
) -> tuple[Repair, ...]:
    """The repairs in their order.

    Args:
        recalibrate: None for where it is known to help.
        aim: Which decides that.

    Raises:
        ArgumentError: One cannot work with the data, or lacks a method.
    """
    check_fold(fold, data)
    found: list[Repair] = []
    if fold == "refit":
        assert data is not None
        found.append(Refit(data, upkeep.progress))
    elif fold:
        found.append(Fold(data, upkeep))
    moves = recalibrates(recalibrate, aim, fold)
    if moves:
        check_repeatable("recalibrate=True", data)
        assert data is not None
        found.append(Recalibrate(data, upkeep))
    elif moves is None and data is not None and not isinstance(data, Iterator):
        found.append(Recalibrate(data, upkeep, by_default=True))
    if balance:
        check_repeatable("balance=True", data)
        assert data is not None
        found.append(Balance(data, upkeep, outputs))
    return (*found, *check_repairs(more))
