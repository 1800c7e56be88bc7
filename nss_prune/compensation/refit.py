"""Fold layer after layer against the whole model, in the order of the network."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.compensation.eligible import reason_to_leave, shared_weights, used_elsewhere
from nss_prune.compensation.folding import Folded, apply
from nss_prune.compensation.paired import paired_statistics
from nss_prune.compensation.problem import changed_channels, resolved
from nss_prune.compensation.solve import ConsumerFold, solved
from nss_prune.core.batches import entered, first_batch, shown
from nss_prune.core.models import Forward, call_model, device_of, evaluation, submodule
from nss_prune.core.processes import agreed
from nss_prune.errors import ArgumentError
from nss_prune.graph.axes import check_fits, map_positions, sides_by_consumer
from nss_prune.graph.slices import Slice
from nss_prune.statistics.survey import survey


@agreed()
def refit(
    model: nn.Module,
    critical: Slice,
    data: Iterable[Any],
    *,
    forward: Forward = call_model,
    progress: bool | None = None,
) -> Folded:
    """Fold in network order, each consumer against what it read in the whole model; in place.

    All channels x of a consumer's input in the whole model are approximated from the kept ones x̃
    as they are in the sliced model whose earlier consumers are fitted already:
    x ≈ μ + B (x̃ − μ̃), where λ shrinks B towards leaving the weights as they are; first those that
    are removed, then what is still missed of all, with a λ of its own: there is less to be found.
    So a consumer makes up for the errors of those before it too, and for norms that see fewer
    neurons. It pays after deep cuts, where samples abound: few of them say less of x̃ than
    :func:`fold` knows of x.

    It costs a pass over the data for every consumer, in which both models run up to that consumer
    (about consumers × passes forward), and a copy of the model.

    Args:
        data: Batches that can be iterated again: a list or a DataLoader.
        forward: Calls the model on the inputs of a batch.
        progress: Show a progress bar over the consumers; None for only on a terminal.

    Raises:
        ArgumentError: The data can be iterated only once.
        DataError, NumericalError: The data cannot be used.
        ModelMismatchError: The slice is of another model. In every case the model is as before.
    """
    if isinstance(data, Iterator):
        raise ArgumentError(
            f"data is a {type(data).__name__}, which can be iterated only once, and refit takes a "
            "pass for every consumer; give a list of batches or a DataLoader"
        )
    check_fits(critical.groups, model)
    consumers = sides_by_consumer(critical.groups)
    shared = shared_weights(model)
    sliced = copy.deepcopy(model)
    folds: dict[str, ConsumerFold] = {}
    with evaluation(model), evaluation(sliced), torch.no_grad():
        inputs, _, _ = entered(model, first_batch(data, device_of(model))[0], 0)
        shared |= used_elsewhere(model, inputs, forward)
        found = survey(model, consumers, inputs, forward)
        for name in shown(found.calls, progress, "refit", "consumer"):
            module = submodule(model, name)
            both = paired_statistics(
                model, sliced, critical, name, data, found, consumers[name], forward
            )
            reason = reason_to_leave(module, both, shared)
            if reason:
                folds[name] = ConsumerFold(note=f"{name} is left unfolded: {reason}")
                continue
            removed = _removed_channels(critical, name, len(both.mean) // 2)
            both = resolved(both, map_positions(module, consumers[name]), int((~removed).sum()))
            folds[name] = solved(name, module, changed_channels(both, removed))
            apply(sliced, {name: folds[name]})
    return apply(model, folds)


def _removed_channels(critical: Slice, name: str, width: int) -> Tensor:
    """True for the channels that a consumer loses, ``[channels]``."""
    removed = torch.zeros(width, dtype=torch.bool)
    found = critical.removed_channels().get((name, "in"))
    if found is not None:
        removed[found[1]] = True
    return removed
