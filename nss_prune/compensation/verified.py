"""Keep a folding only where it helps: measured on the data, at every consumer and at the outputs.

The statistics of a folding are those of the whole model. In the smaller one a norm sees fewer
neurons, and earlier consumers are folded, so what a consumer reads there can be so different that
its folding does harm. Here it is measured: the squared distance of each consumer's output to that
of the whole model, with and without the folding, added up over all of the data. A pass calls the
model three times with each batch, and keeps nothing of it but these sums.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.compensation.folding import apply
from nss_prune.compensation.solve import ConsumerFold
from nss_prune.core.afterwards import afterwards
from nss_prune.core.batches import as_computed, counted_batches
from nss_prune.core.hooks import attached
from nss_prune.core.models import Forward, call_model, evaluation, run, submodule
from nss_prune.core.nested import tensors_in
from nss_prune.core.processes import total_by_key
from nss_prune.core.undo import Snapshot
from nss_prune.graph.slices import Slice

ROUNDS = 3
ROUNDING = 1e-6  # relative to the larger of the error and the output's power times its precision
OUTPUTS = ""  # stands for the outputs of the model among its consumers

Folds = Mapping[str, ConsumerFold]


def verified(
    model: nn.Module,
    critical: Slice,
    folds: Folds,
    data: Iterable[Any],
    forward: Forward = call_model,
    progress: bool | None = False,
) -> dict[str, ConsumerFold]:
    """The folds without those that make the error of their consumer's output larger.

    Args:
        folds: By :func:`nss_prune.compensation.folding.folding`; not applied yet.
        data: Batches that can be iterated again; the model is left as it is.
        progress: Show a progress bar; None for only on a terminal.

    Returns:
        A fold for each consumer; those left out have a note that says by how much.

    Raises:
        DataError, NumericalError: The data cannot be used.
    """
    kept = dict(folds)
    if not _changing(kept):
        return kept
    for _ in range(ROUNDS):
        plain, found = _errors(model, critical, kept, data, forward, progress)
        worse = [name for name in found if found[name] > plain[name] * (1 + ROUNDING)]
        if not worse:
            return kept
        harmful = [name for name in worse if name in _changing(kept)]
        # Where only what is behind them suffers, it cannot be told which one is to blame.
        for name in harmful or _changing(kept):
            place = name if name in harmful else worse[0]
            kept[name] = ConsumerFold(note=_note(name, place, plain[place], found[place]))
        if not _changing(kept):
            return kept
    plain, found = _errors(model, critical, kept, data, forward, progress)
    still = any(found[name] > plain[name] * (1 + ROUNDING) for name in found)
    for name in _changing(kept):
        if still:
            kept[name] = ConsumerFold(note=_note(name, name, plain[name], found[name]))
    return kept


def _changing(folds: Folds) -> list[str]:
    return [
        name for name, fold in folds.items() if fold.weight is not None or fold.constant is not None
    ]


def _note(name: str, place: str, plain: float, folded: float) -> str:
    where = "its output" if place == name else f"the output of {place or 'the model'}"
    return (
        f"{name} is left unfolded: on the data the error of {where} would be "
        f"{(folded / max(plain, 1e-300)) ** 0.5:.2f} times as large"
    )


def _errors(
    model: nn.Module,
    critical: Slice,
    folds: Folds,
    data: Iterable[Any],
    forward: Forward,
    progress: bool | None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Consumer -> squared distance of what it puts out in the sliced and in the whole model.

    Over the samples of all processes.

    Returns:
        Without the folds, and with them, of the same batches: a loader may draw others each time.
    """
    names = {member.name for group in critical.groups for member in group.consumers}
    plain: dict[str, float] = dict.fromkeys((*names, OUTPUTS), 0.0)
    folded = dict(plain)
    with evaluation(model), torch.no_grad():
        for number, inputs, _ in counted_batches(model, data, progress, "verification"):
            whole = _outputs(model, names, inputs, number, forward)
            rounding = {
                name: [_rounding(each) for each in values] for name, values in whole.items()
            }
            for total, used in ((plain, {}), (folded, folds)):
                with _folded(model, used), critical.masked(model):
                    sliced = _outputs(model, names, inputs, number, forward)
                for name, values in whole.items():
                    pairs = zip(values, rounding[name], sliced.get(name, ()), strict=False)
                    for first, noise, second in pairs:
                        total[name] += max(0.0, _distance(first, second, used.get(name)) - noise)
    return total_by_key(plain), total_by_key(folded)


@contextlib.contextmanager
def _folded(model: nn.Module, folds: Folds) -> Iterator[None]:
    if not folds:
        yield
        return
    with afterwards(Snapshot(model).restore):
        apply(model, folds)
        yield


def _outputs(
    model: nn.Module, names: Iterable[str], inputs: Any, number: int, forward: Forward
) -> dict[str, list[Tensor]]:
    """Consumer -> what it puts out, call by call."""
    found: dict[str, list[Tensor]] = {}

    def seen(name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        found.setdefault(name, []).extend(tensors_in(output))

    hooks = [
        (submodule(model, name).register_forward_hook, functools.partial(seen, name))
        for name in names
    ]
    with attached(*hooks):
        outputs = run(model, inputs, number, forward)
    return {**found, OUTPUTS: [each for each in tensors_in(outputs) if each.is_floating_point()]}


def _distance(whole: Tensor, sliced: Tensor, fold: ConsumerFold | None) -> float:
    if whole.shape != sliced.shape or not whole.is_floating_point():
        return 0.0
    difference = as_computed(sliced) - as_computed(whole)
    if fold is not None and fold.norm is not None and fold.constant is not None:
        # The norm behind adds the constant.
        difference += fold.constant.to(difference).view(-1, *(1,) * (whole.dim() - 2))
    return float(difference.square_().sum())


def _rounding(whole: Tensor) -> float:
    """What the squared distance can be by rounding alone."""
    if not whole.is_floating_point():
        return 0.0
    return torch.finfo(whole.dtype).eps ** 2 * float(as_computed(whole).square().sum())
