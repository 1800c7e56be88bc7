"""Slice -> checked plan -> smaller model, or the model exactly as it was."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune.adapters import ADAPTERS, Adapter, apply_changes, planned_changes
from nss_prune.errors import NothingToPruneError, NSSPruneError, RemovalError
from nss_prune.neurons import (
    Forward,
    Member,
    NeuronGroup,
    NeuronMap,
    call_model,
    check_fits,
    evaluation,
    flags_kept,
    full_precision,
    map_tensors,
    submodule,
    tensors_in,
)
from nss_prune.slicing import Slice

Pruners = Mapping[Any, Any]
PIECE = 32  # pixels; what models that halve their maps five times can divide


class LayerNormPruner(tp.pruner.function.LayernormPruner):  # type: ignore[misc]
    """torch-pruning's, with the kept weights in their order.

    Its own takes them in the order in which a Python set lists them, which is not ascending for
    sparse sets of large numbers.
    """

    def prune_out_channels(self, layer: nn.LayerNorm, idxs: list[int]) -> nn.LayerNorm:
        """Keep all channels but ``idxs`` along the last normalized axis."""
        gone = set(idxs)
        kept = [i for i in range(layer.normalized_shape[-1]) if i not in gone]
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, self._prune_parameter_and_grad(parameter, kept, -1))
        layer.normalized_shape = (*layer.normalized_shape[:-1], len(kept))
        return layer

    prune_in_channels = prune_out_channels


@dataclass(frozen=True)
class Step:
    """Channels to remove from one side of one module (or bare parameter)."""

    member: Member
    channels: Tensor


def plan_removal(critical: Slice, model: nn.Module) -> tuple[Step, ...]:
    """What to remove where, checked against the model, which is not touched.

    Raises:
        ModelMismatchError: The model does not have the layers of the slice.
        RemovalError: A module would be left without channels.
    """
    check_fits(critical.groups, model)
    steps = []
    for member, channels in critical.removed_channels().values():
        if len(channels.unique()) != len(channels):
            raise RemovalError(f"channels of {member.name} were to go twice: {channels.tolist()}")
        if len(channels) >= member.width:
            raise RemovalError(
                f"all {member.width} channels of {member.name} were to go; use a larger theta"
            )
        steps.append(Step(member, channels))
    return tuple(steps)


def _pruning_function(module: nn.Module, customized: Pruners) -> Any:
    """torch-pruning's functions for one module, the caller's own first."""
    if module in customized:
        return customized[module]
    if type(module) in customized:
        return customized[type(module)]
    kind = tp.ops.module2type(module)
    if kind == tp.ops.OPTYPE.LN:
        return LayerNormPruner()
    return tp.pruner.function.PrunerBox[kind]


@full_precision()
def remove(
    model: nn.Module,
    critical: Slice,
    example_inputs: Any,
    *,
    customized_pruners: Pruners | None = None,
    forward: Forward = call_model,
    adapters: Sequence[Adapter] = ADAPTERS,
) -> nn.Module:
    """Remove everything outside the slice, in place, and check the result.

    The smaller model must give what the masked one gave on the example inputs, or on a piece of
    them where the model takes smaller pictures; both are computed without TF32. If the model has
    layers that only training uses, it must also run in training mode. Training modes,
    requires_grad flags and hooks stay as they were; tensors that shrink are new ones, so build
    optimisers afterwards.

    Args:
        example_inputs: Inputs of a call of the model.
        customized_pruners: As torch-pruning takes them.
        forward: Function of (model, example_inputs) that gives the outputs.
        adapters: Those with which the neurons were found.

    Returns:
        ``model``.

    Raises:
        RemovalError: The smaller model would not run or would compute something else.
        ModelMismatchError: The slice is of another model.
    """
    steps = plan_removal(critical, model)
    changes = planned_changes(model, critical, adapters)
    with _layers_used(model) as used, critical.masked(model):
        inputs, expected = _masked_outputs(model, example_inputs, forward)
    resting = {layer for layer in model.modules() if _has_parameters(layer)} - used
    trains = bool(resting) and _trains_any(model, resting, example_inputs, forward)
    with undone_on_error(model):
        execute(model, steps, customized_pruners or {})
        apply_changes(changes)
        with evaluation(model), torch.no_grad():
            check_outputs(expected, tensors_in(_forward(model, inputs, forward)))
        if trains:
            with training(model), torch.no_grad():
                _forward(model, example_inputs, forward)
    return model


def _masked_outputs(
    model: nn.Module, example_inputs: Any, forward: Forward
) -> tuple[Any, list[Tensor]]:
    """Inputs that a masked model takes, small ones if it can, and what it makes of them."""
    with evaluation(model), torch.no_grad():
        small = map_tensors(_piece, example_inputs)
        if any(len(tensor) for tensor in tensors_in(small)):
            with contextlib.suppress(Exception):
                return small, [tensor.clone() for tensor in tensors_in(forward(model, small))]
        try:
            outputs = tensors_in(forward(model, example_inputs))
        except Exception as error:
            raise RemovalError(
                f"the masked model does not run: {error}; name the layer in ignored_layers"
            ) from error
        return example_inputs, [tensor.clone() for tensor in outputs]


def _piece(tensor: Tensor) -> Tensor:
    """A quarter of a picture's height and width, in multiples of 32 pixels."""
    if tensor.dim() != 4 or min(tensor.shape[2:]) < 2 * PIECE:
        return tensor
    height, width = (-(-side // (4 * PIECE)) * PIECE for side in tensor.shape[2:])
    return tensor[..., :height, :width]


@contextlib.contextmanager
def _layers_used(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The layers with parameters that are called inside."""
    used: set[nn.Module] = set()
    with contextlib.ExitStack() as stack:
        for layer in model.modules():
            if _has_parameters(layer):
                hook = layer.register_forward_pre_hook(lambda called, _: used.add(called))
                stack.callback(hook.remove)
        yield used


def _has_parameters(layer: nn.Module) -> bool:
    return any(parameter is not None for parameter in layer._parameters.values())


def _trains_any(
    model: nn.Module, layers: set[nn.Module], example_inputs: Any, forward: Forward
) -> bool:
    """Whether a call in training mode works, and uses some of these layers."""
    with _layers_used(model) as used, training(model), torch.no_grad():
        try:
            forward(model, example_inputs)
        except Exception:
            return False
    return not used.isdisjoint(layers)


def verified(
    model: nn.Module,
    neurons: NeuronMap,
    example_inputs: Any,
    *,
    customized_pruners: Pruners | None = None,
    forward: Forward = call_model,
    adapters: Sequence[Adapter] = ADAPTERS,
) -> NeuronMap:
    """The neurons whose removal can be trusted; the model is left as found.

    About half of the neurons of all groups, drawn at random and an odd number, are removed on
    trial: what only works for multiples of something must not pass. If that fails the check of
    :func:`remove`, the groups to blame are searched for, and left alone with the reason.

    Raises:
        NothingToPruneError: No group can be trusted.
    """
    halves = _random_halves(neurons)

    def failure(names: Sequence[str]) -> str | None:
        """Why these groups cannot be halved together, or None."""
        chosen = {name: kept for name, kept in halves.items() if name in names}
        critical = Slice(chosen, neurons.groups)
        return trial(model, critical, example_inputs, customized_pruners, forward, adapters)

    blamed = _blamed(neurons.groups, failure)
    if len(blamed) < len(neurons.groups):
        return neurons.without(blamed)
    if not _is_finite(model, example_inputs, forward):
        return neurons  # NaN compares with nothing; what profiles the model refuses it
    all_reasons = {**neurons.left_alone, **blamed}
    reasons = "; ".join(f"{name}: {reason}" for name, reason in all_reasons.items())
    raise NothingToPruneError(f"no layer is left to prune on trial: {reasons}")


def _random_halves(neurons: NeuronMap) -> dict[str, Tensor]:
    """Layer -> True for the neurons that stay on trial, an odd number."""
    generator = torch.Generator().manual_seed(0)
    halves = {}
    for group in neurons.groups:
        kept = torch.zeros(group.size, dtype=torch.bool)
        count = group.size // 2 | 1
        kept[torch.randperm(group.size, generator=generator)[:count]] = True
        halves[group.name] = kept
    return halves


def _is_finite(model: nn.Module, example_inputs: Any, forward: Forward) -> bool:
    with evaluation(model), torch.no_grad():
        outputs = tensors_in(forward(model, example_inputs))
    return all(bool(torch.isfinite(tensor).all()) for tensor in outputs)


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode inside; statistics, modes and random numbers as they were outside."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with flags_kept(model), torch.random.fork_rng():
            model.train()
            yield
    finally:
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)


def _blamed(
    groups: Sequence[NeuronGroup], failure: Callable[[Sequence[str]], str | None]
) -> dict[str, str]:
    """The groups that fail by themselves, or only with others that do not, and why.

    Halves are tried, then quarters, and so on. Groups at the same place of repeated blocks stay
    together, and where the first of them fails alone, all are taken to: with a dozen blocks of
    attention, trying each would take a dozen times as long.
    """
    good: list[str] = []
    blamed: dict[str, str] = {}

    def sort_out(alike: Sequence[Sequence[str]]) -> None:
        reason = failure([*good, *itertools.chain(*alike)])
        if reason is None:
            good.extend(itertools.chain(*alike))
        elif len(alike) > 1:
            middle = len(alike) // 2
            sort_out(alike[:middle])
            sort_out(alike[middle:])
        elif len(alike[0]) > 1 and failure([*good, alike[0][0]]) is None:
            sort_out([[name] for name in alike[0]])
        else:
            blamed.update(dict.fromkeys(alike[0], reason))

    by_place: dict[Any, list[str]] = {}
    for group in groups:
        sides = tuple(sorted(member.side for member in group.members))
        by_place.setdefault((re.sub(r"\d+", "#", group.name), sides), []).append(group.name)
    sort_out(list(by_place.values()))
    return blamed


class _TrialOver(Exception):
    """Leaves a trial that went well, so that it is undone."""


def trial(
    model: nn.Module,
    critical: Slice,
    example_inputs: Any,
    customized_pruners: Pruners | None = None,
    forward: Forward = call_model,
    adapters: Sequence[Adapter] = ADAPTERS,
) -> str | None:
    """Why a removal would fail, or None; the model is left as found either way."""
    try:
        with undone_on_error(model):
            remove(
                model,
                critical,
                example_inputs,
                customized_pruners=customized_pruners,
                forward=forward,
                adapters=adapters,
            )
            raise _TrialOver
    except RemovalError as error:
        return None if isinstance(error.__cause__, _TrialOver) else str(error)


def _forward(model: nn.Module, example_inputs: Any, forward: Forward) -> Any:
    try:
        return forward(model, example_inputs)
    except Exception as error:
        raise RemovalError(
            f"the smaller model does not run: {error}; the model was put back. Name the layer in "
            "ignored_layers"
        ) from error


def execute(model: nn.Module, steps: tuple[Step, ...], customized: Pruners) -> None:
    """Carry a plan out. On an error the model is left half done: see ``undone_on_error``."""
    # Chosen before anything shrinks: a grouped convolution may come to look like a depthwise one.
    functions = {
        step.member.name: _pruning_function(submodule(model, step.member.name), customized)
        for step in steps
        if step.member.axis is None
    }
    for step in steps:
        name, indices = step.member.name, step.channels.tolist()
        if step.member.axis is not None:
            _shrink_parameter(model, step.member, indices)
            continue
        module = submodule(model, name)
        flags = {key: value.requires_grad for key, value in module.named_parameters()}
        function = functions[name]
        if step.member.side == "in":
            function.prune_in_channels(module, indices)
        else:
            function.prune_out_channels(module, indices)
        for key, value in module.named_parameters():
            value.requires_grad_(flags[key])


def _shrink_parameter(model: nn.Module, member: Member, indices: list[int]) -> None:
    parent_name, _, name = member.name.rpartition(".")
    parent = submodule(model, parent_name)
    parameter = getattr(parent, name)
    keep = torch.ones(parameter.shape[member.axis or 0], dtype=torch.bool)
    keep[indices] = False
    where = keep.nonzero().flatten().to(parameter.device)
    smaller = parameter.detach().index_select(member.axis or 0, where)
    setattr(parent, name, nn.Parameter(smaller, parameter.requires_grad))


def check_outputs(expected: list[Tensor], actual: list[Tensor]) -> None:
    """Raise RemovalError unless shapes and values agree to the precision of the dtype."""
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise RemovalError(
            f"the outputs were {[tuple(t.shape) for t in expected]} and would become "
            f"{[tuple(t.shape) for t in actual]}; the model was put back"
        )
    for wanted, found in zip(expected, actual, strict=True):
        if not wanted.is_floating_point():
            continue
        allowed = 10 * torch.finfo(wanted.dtype).eps ** 0.5
        scale = float(wanted.abs().max()) if wanted.numel() else 0.0
        difference = float((wanted - found).abs().max()) if wanted.numel() else 0.0
        if not difference <= allowed * max(scale, torch.finfo(wanted.dtype).tiny):
            raise RemovalError(
                f"the smaller model's outputs differ by {difference:.3g} from the masked "
                f"model's, which reach {scale:.3g}; the model was put back. Name the layers that "
                "torch-pruning describes wrongly in ignored_layers"
            )


@contextlib.contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """If the body raises, every module gets back the very tensors and attributes it had.

    Tensors are not copied: a removal replaces them and leaves the old ones as they are.
    """
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    except BaseException as error:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents:
                container.clear()
                container.update(content)
        if isinstance(error, NSSPruneError) or not isinstance(error, Exception):
            raise
        raise RemovalError(
            f"the removal failed: {type(error).__name__}: {error}; the model was put back"
        ) from error


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The dicts and sets of a module with what they hold.

    They are refilled and not replaced, because the handles of hooks refer to the dicts.
    """
    return [
        (value, value.copy()) for value in vars(module).values() if isinstance(value, (dict, set))
    ]
