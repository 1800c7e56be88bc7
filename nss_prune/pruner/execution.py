"""Carry a plan out, with the repairs around the removal, or leave everything as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nss_prune.core.processes import agreed, copy_from_first
from nss_prune.core.undo import restored_on_error
from nss_prune.graph.bases import change_basis
from nss_prune.pruner.configuration import follow_configuration
from nss_prune.pruner.plan import Plan
from nss_prune.pruner.repair import Repair, Repaired
from nss_prune.pruner.wrapper import wrap_again


def carry_out(plan: Plan, repairs: Sequence[Repair], wrapper: nn.Module | None = None) -> Repaired:
    """Remove what a plan does not keep, in place; in all processes alike.

    Args:
        wrapper: Around the model, which follows where it refers to the parameters.

    Raises:
        RemovalError: The smaller model would not work.
        DataError, NumericalError: From the repairs, and what the data raises goes on as it is. In
            every case the model is as before.
    """
    subject, chosen = plan.subject, replace(plan.slice, bases=())
    seen = [repair.observe(subject, plan.evidence) for repair in repairs]
    with restored_on_error(subject.model), agreed():
        change_basis(subject.model, plan.slice.bases)
        done = [
            repair.before(subject, chosen, known)
            for repair, known in zip(repairs, seen, strict=True)
        ]
        subject.remove(subject.model, chosen)
        done += [
            repair.after(subject, chosen, known)
            for repair, known in zip(repairs, seen, strict=True)
        ]
    limits = follow_configuration(subject.model, chosen)
    copy_from_first(subject.model)
    if isinstance(wrapper, DistributedDataParallel):
        wrap_again(wrapper)
    return Repaired(
        (*(note for repaired in done for note in repaired.notes), *limits),
        tuple(layer for repaired in done for layer in repaired.changed),
    )
