"""Optimisers that go on after a pruning step, with what they know of the weights that stay."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nss_prune.core.nested import tensors_in
from nss_prune.errors import ArgumentError
from nss_prune.graph.axes import axes_of, check_fits
from nss_prune.graph.slices import Slice
from nss_prune.pruner.classes import KEPT_CLASSES
from nss_prune.pruner.pruner import NSSPruner

Heirs = dict[nn.Parameter, dict[str, Any]]
"""The parameters that took the place of one (several where a removal parted tied names), each
with its optimiser state."""


@contextlib.contextmanager
def rebind_optimizer(
    optimizer: Optimizer, model: nn.Module, removal: NSSPruner | Slice
) -> Iterator[None]:
    """Let an optimiser follow the model through the removal inside the context.

    ::

        with rebind_optimizer(optimizer, model, pruner):
            pruner.step()

    Afterwards the parameter groups hold the new, smaller parameters, and the state (momentum,
    moments) has the entries of the weights that stay. A bias that folding has made joins the group
    of its weight, and the rows of other classes go with ``classes=``. State is by coordinates: that
    of layers whose heads got other ones (:mod:`nss_prune.allocation.head_bases`) begins anew.
    Learning rates and other options remain, and a scheduler goes on.

    Args:
        optimizer: Any whose state tensors are single numbers, have their parameter's shape, or
            have size 1 in place of some of its axes (SGD, Adam, AdamW, RMSprop, torch's
            Adafactor, ...). It may hold some of the model's parameters only.
        model: The model that is pruned.
        removal: The pruner that takes one step inside, or the slice that :func:`nss_prune.remove`
            is given.

    Raises:
        ArgumentError: Before the body, if the optimiser has parameters of another model or state
            of another shape, or the pruner another model; after it, if something else was
            removed than the slice or the one step. The optimiser is then as it was, as it is
            when the body raises.
        ModelMismatchError: Before the body, if the slice is of another model.
    """
    before = dict(model.named_parameters(remove_duplicate=False))
    _check_removal(model, removal)
    _check_parameters(optimizer, before)
    _check_state(optimizer)
    yield
    after = dict(model.named_parameters(remove_duplicate=False))
    if all(after.get(name) is parameter for name, parameter in before.items()):
        return
    critical = removal if isinstance(removal, Slice) else removal.slice
    stays = _entries_that_stay(critical, model, before)
    turned = {change.name for change in critical.bases}
    folded = set() if isinstance(removal, Slice) else {*removal.folded, *turned}
    _replace(optimizer, _succession(optimizer, before, after, stays, folded, turned))


def _check_removal(model: nn.Module, removal: NSSPruner | Slice) -> None:
    if isinstance(removal, Slice):
        check_fits(removal.groups, model)
    elif removal.model is not model:
        raise ArgumentError(
            f"the pruner is of another {type(removal.model).__name__} than the model given; pass "
            "pruner.model"
        )


def _check_parameters(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> None:
    known = set(named.values())
    for position, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in known:
                raise ArgumentError(
                    f"parameter group {position} of the optimiser has a parameter of shape "
                    f"{tuple(parameter.shape)} that the model does not have; pass an optimiser "
                    "over parameters of this model, as it is before the removal"
                )


def _check_state(optimizer: Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not _follows(value, parameter):
                raise ArgumentError(
                    f"{type(optimizer).__name__} keeps {key!r} in another shape than that of its "
                    f"parameter, {tuple(parameter.shape)}, so its entries belong to no weights; "
                    "make a new optimiser after the removal instead"
                )


def _follows(value: Any, parameter: Tensor) -> bool:
    """Whether a state value holds for all weights at once, or has the axes of its parameter."""
    if not isinstance(value, Tensor):
        return not tensors_in(value)
    if value.numel() == 1:
        return True
    return value.dim() == parameter.dim() and all(
        size in (1, full) for size, full in zip(value.shape, parameter.shape, strict=True)
    )


def _entries_that_stay(
    critical: Slice, model: nn.Module, before: Mapping[str, Tensor]
) -> dict[str, list[tuple[int, Tensor]]]:
    """Parameter -> (axis, positions that stay along it), from the parameters as they were."""
    stays: dict[str, list[tuple[int, Tensor]]] = {}

    def remove(parameter: str, axis: int, channels: Tensor) -> None:
        mask = torch.ones(before[parameter].shape[axis], dtype=torch.bool)
        # A grouped convolution loses the same channels in each group, and holds one's.
        mask[channels[channels < len(mask)]] = False
        stays.setdefault(parameter, []).append((axis, mask.nonzero().flatten()))

    for member, channels in critical.removed_channels().values():
        for parameter, axis in axes_of(member, model):
            remove(parameter, axis, channels)
    for name, module in model.named_modules():
        for key in module._parameters if hasattr(module, KEPT_CLASSES) else ():
            parameter, classes = f"{name}.{key}".lstrip("."), getattr(module, KEPT_CLASSES)
            if parameter in before and len(before[parameter]) > len(classes):
                stays.setdefault(parameter, []).append((0, torch.tensor(classes)))
    return stays


def _succession(
    optimizer: Optimizer,
    before: Mapping[str, nn.Parameter],
    after: Mapping[str, nn.Parameter],
    stays: Mapping[str, list[tuple[int, Tensor]]],
    folded: Collection[str],
    turned: Collection[str],
) -> dict[nn.Parameter, Heirs]:
    """Every parameter of the optimiser -> its heirs.

    Args:
        folded: Modules whose weights have other values than before.
        turned: Those that are in other coordinates, where state means nothing.

    Raises:
        ArgumentError: A new parameter is not the old one without what was to go.
    """
    succession: dict[nn.Parameter, Heirs] = {
        parameter: {} for group in optimizer.param_groups for parameter in group["params"]
    }
    for name, old in before.items():
        if old not in succession:
            continue
        new, state = after.get(name), optimizer.state.get(old, {})
        if new is not old:
            layer, entries = name.rpartition(".")[0], stays.get(name, [])
            expected = _kept(old.detach(), entries)
            new = _checked_heir(name, new, expected, layer in folded)
            known = {} if layer in turned else state
            state = {key: _kept(value, entries) for key, value in known.items()}
        succession[old][new] = state
    for name in after.keys() - before.keys():
        weight = before.get(f"{name.rpartition('.')[0]}.weight".lstrip("."))
        if weight in succession:
            succession[weight][after[name]] = {}
    return succession


def _kept(value: Any, entries: list[tuple[int, Tensor]]) -> Any:
    """What stays of a state tensor; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    kept = value.clone()
    for axis, positions in entries:
        if value.dim() and value.shape[axis] > 1:
            kept = kept.index_select(axis, positions.to(value.device))
    return kept


def _checked_heir(
    name: str, new: nn.Parameter | None, expected: Tensor, folded: bool
) -> nn.Parameter:
    # A removal alone copies values, so that a difference means that other entries went.
    same = _alike if folded else _equal
    if new is None or not same(new.detach(), expected):
        shape = "gone" if new is None else f"of shape {tuple(new.shape)}"
        raise ArgumentError(
            f"{name} is {shape} and not what the slice leaves of it, {tuple(expected.shape)}: take "
            "one step of the pruner, or remove the given slice, and nothing else inside the "
            "context. The optimiser still has the old parameters; make a new one"
        )
    return new


def _alike(first: Tensor, second: Tensor) -> bool:
    return (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)


def _equal(first: Tensor, second: Tensor) -> bool:
    return _alike(first, second) and torch.equal(first, second)


def _replace(optimizer: Optimizer, succession: Mapping[nn.Parameter, Heirs]) -> None:
    for old, heirs in succession.items():
        optimizer.state.pop(old, None)
        optimizer.state.update({new: state for new, state in heirs.items() if state})
    for group in optimizer.param_groups:
        heirs_of = [list(succession[parameter]) for parameter in group["params"]]
        if "param_names" in group:
            labelled = zip(group["param_names"], heirs_of, strict=True)
            group["param_names"][:] = [label for label, heirs in labelled for _ in heirs]
        # In place, because an optimiser may keep a reference to the list.
        group["params"][:] = [heir for heirs in heirs_of for heir in heirs]
