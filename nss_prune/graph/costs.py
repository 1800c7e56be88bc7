"""Parameters and multiply-accumulates, of a model and of what a slice keeps of it."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nss_prune.core import shapes
from nss_prune.core.hooks import attached
from nss_prune.core.models import (
    Forward,
    call_model,
    evaluation,
    meta_copy,
    without_values,
)
from nss_prune.core.multihead import INPUTS, named_inputs
from nss_prune.core.nested import map_tensors
from nss_prune.graph.axes import axes_of, check_fits
from nss_prune.graph.neurons import Member, NeuronGroup

DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Cost:
    """Size of a model: parameters, and multiply-accumulates for the example inputs."""

    parameters: int
    macs: int


class LateCost(Cost):
    """The size of a model whose multiply-accumulates are counted when they are first read.

    A copy or pickle of it is a :class:`Cost`.

    Args:
        count: Counts them.
    """

    def __init__(self, parameters: int, count: Callable[[], int]) -> None:
        vars(self).update(parameters=parameters, _count=count)

    @functools.cached_property
    def macs(self) -> int:  # type: ignore[override]
        """Multiply-accumulates for the example inputs."""
        counted: int = vars(self)["_count"]()
        vars(self)["_count"] = None  # nothing is held any more
        return counted

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Cost):
            return NotImplemented
        return (self.parameters, self.macs) == (other.parameters, other.macs)

    def __hash__(self) -> int:
        return hash((self.parameters, self.macs))

    def __reduce__(self) -> tuple[Any, ...]:
        return Cost, (self.parameters, self.macs)


def measure(model: nn.Module, example_inputs: Any, forward: Forward = call_model) -> Cost:
    """Count the parameters, and the multiply-accumulates of one call."""
    return Cost(parameters_of(model), macs_by_module(model, example_inputs, forward)[""])


def parameters_of(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs_by_module(
    model: nn.Module, example_inputs: Any, forward: Forward = call_model
) -> dict[str, int]:
    """Module -> multiply-accumulates of one call, its children's included; "" is the model.

    Half the floating-point operations that torch counts in convolutions, matrix products and
    attention, whatever the modules are called. Where a copy of the model runs on tensors without
    values, nothing is computed; otherwise the model itself is called.
    """
    found = macs_without_values(meta_copy(model), example_inputs, forward)
    return _counted(model, example_inputs, forward) if found is None else found


def macs_without_values(
    copy: nn.Module, example_inputs: Any, forward: Forward = call_model
) -> dict[str, int] | None:
    """As :func:`macs_by_module`, of a copy without values; None where it does not run.

    A model that branches on values does not, nor one with an index that must be a number.
    """
    try:
        return _counted(copy, map_tensors(without_values, example_inputs), forward)
    except Exception:
        return None


def projections(
    model: nn.Module, example_inputs: Any, forward: Forward = call_model
) -> dict[str, dict[str, int]]:
    """Module -> full name of a weight -> multiply-accumulates with it in one call.

    Of torch's attention, which multiplies by weights of its own and by those of a layer inside,
    ``out_proj``, without calling it.
    """
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        return {}
    try:
        without = map_tensors(without_values, example_inputs)
        return _projections(meta_copy(model), without, forward)
    except Exception:  # it branches on values
        return _projections(model, example_inputs, forward)


def _projections(
    model: nn.Module, example_inputs: Any, forward: Forward
) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    hooks = [
        (
            functools.partial(module.register_forward_pre_hook, with_kwargs=True),
            functools.partial(_count_projections, found.setdefault(name, Counter()), name),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    with attached(*hooks), evaluation(model), torch.no_grad(), _plain_attention():
        forward(model, example_inputs)
    return {name: dict(counts) for name, counts in found.items()}


def _count_projections(
    counts: Counter[str], name: str, module: nn.MultiheadAttention, arguments: Any, keywords: Any
) -> None:
    """Before a call of torch's attention."""
    given = named_inputs(arguments, keywords)
    fused = module.in_proj_weight
    for part in INPUTS:
        key = "in_proj_weight" if fused is not None else f"{part[0]}_proj_weight"
        rows = fused.shape[0] // 3 if fused is not None else module.get_parameter(key).shape[0]
        counts[f"{name}.{key}"] += given[part].numel() * rows
    if type(module) is nn.MultiheadAttention:
        counts[f"{name}.out_proj.weight"] += given["query"].numel() * module.out_proj.out_features


def _counted(model: nn.Module, example_inputs: Any, forward: Forward) -> dict[str, int]:
    counter = _Counter()
    hooks = [
        pair
        for name, module in model.named_modules()
        for pair in (
            (module.register_forward_pre_hook, functools.partial(counter.enter, name)),
            (
                functools.partial(module.register_forward_hook, always_call=True),
                functools.partial(counter.leave, name),
            ),
        )
    ]
    # The fused kernels of attention are not counted on every device, their parts are.
    with attached(*hooks), evaluation(model), torch.no_grad(), _plain_attention(), counter:
        forward(model, example_inputs)
    return {name: operations // 2 for name, operations in counter.operations.items()}


class _Counter(TorchDispatchMode):
    """Counts the floating-point operations of this thread by the modules that they are in.

    torch's own counter follows the modules by hooks of all modules of the process, so that models
    in other threads are counted as well.

    Attributes:
        operations: Module -> its operations, its children's included; "" is the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter({"": 0})
        self._inside: list[str] = []

    def enter(self, name: str, *_: Any) -> None:
        """Before a call of a module."""
        self._inside.append(name)

    def leave(self, name: str, *_: Any) -> None:
        """After it."""
        if name in self._inside:
            self._inside.remove(name)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = function._overloadpacket
        if not (packet in flop_registry or function in shapes.RULES or function is DEVICE):
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = shapes.called(function, args, kwargs)
        if packet in flop_registry:
            operations = flop_registry[packet](*args, **kwargs, out_val=result)
            for name in {"", *self._inside}:
                self.operations[name] += operations
        return result


_SETTING = threading.Lock()


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Within the context attention is made of products. The settings are the whole process's."""
    with _SETTING, sdpa_kernel(SDPBackend.MATH):
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def parameters_left(
    groups: Sequence[NeuronGroup], kept: Mapping[str, Tensor], model: nn.Module
) -> dict[str, int]:
    """Parameter -> number of its entries after the removal.

    Raises:
        ModelMismatchError: The model does not have the layers of the slice.
    """
    return ParameterCount(groups, model).left(kept)


class ParameterCount:
    """What slices leave of the parameters of a model, without a look at it for each.

    Raises:
        ModelMismatchError: The model does not have the layers of the groups.

    Attributes:
        shapes: Parameter -> its shape.
        first_names: Every name of a parameter -> the first one, by which it is known here.
    """

    def __init__(self, groups: Sequence[NeuronGroup], model: nn.Module) -> None:
        check_fits(groups, model)
        self.shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
        self._shrinking: dict[str, set[int]] = {}
        self._members: dict[tuple[str, int], list[tuple[str, Member, int | None]]] = {}
        self._inside = {group.name for group in groups if group.is_inside_heads}
        self.first_names = _first_names(model)
        for group in groups:
            for member in group.members:
                entry = (group.name, member, _repeats(member, group.size))
                for name, axis in axes_of(member, model):
                    parameter = self.first_names[name]
                    axis %= len(self.shapes[parameter])
                    self._shrinking.setdefault(parameter, set()).add(axis)
                    known = self._members.setdefault((parameter, axis), [])
                    # A layer that the model holds under two names shrinks once.
                    if not known or known[0][1].name == member.name:
                        known.append(entry)

    def left(self, kept: Mapping[str, Tensor]) -> dict[str, int]:
        """Parameter -> number of its entries after the removal of all that is not kept.

        Args:
            kept: Layer -> True where a neuron stays, bool ``[neurons]``.
        """
        gone = {name: ~stays for name, stays in kept.items()}
        counts = {name: int(mask.sum()) for name, mask in gone.items()}
        left = {name: math.prod(shape) for name, shape in self.shapes.items()}
        for parameter, axes in self._shrinking.items():
            shape = list(self.shapes[parameter])
            for axis in axes:
                share = inside = 0.0
                for name, member, repeats in self._members[parameter, axis]:
                    if not counts.get(name):
                        continue
                    if repeats is None:
                        lost = int(gone[name][member.neurons].sum()) / member.width
                    else:
                        lost = counts[name] * repeats / member.width
                    if name in self._inside:
                        inside = lost
                    else:
                        share += lost
                share = 1 - (1 - share) * (1 - inside)  # dimensions of the heads that stay
                if shape[axis] > 1:
                    shape[axis] -= round(shape[axis] * share)
            left[parameter] = math.prod(shape)
        return left


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter -> the first one."""
    first = {id(value): name for name, value in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in everything}


def _repeats(member: Member, size: int) -> int | None:
    """How often each neuron of a group comes on a side, where that is the same for all."""
    counts = torch.bincount(member.neurons, minlength=size)
    return int(counts[0]) if bool((counts == counts[0]).all()) else None
