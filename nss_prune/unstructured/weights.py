"""Which weights can be pruned: those of every Linear and convolution of a model.

Biases and norms are never pruned, nor are the packed projections of
`nn.MultiheadAttention`, which belong to no Linear (its output projection does).
A weight that several modules share is one weight. A module that normalises its weight in
its forward, as weight standardisation does, has the weight it stores pruned.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from nss_prune.errors import ArgumentError, NothingToPruneError, NumericalError
from nss_prune.unstructured.magnitudes import SUPPORTED_TYPES, Magnitudes

IgnoredLayers = Iterable[nn.Module | str]


@dataclass(frozen=True, eq=False)
class Layer:
    """One prunable weight, as it was when the model was read.

    Attributes:
        name: qualified name of the first module that holds the weight.
        module: that module.
        weight: the parameter, `[outputs, inputs, *kernel]` (`[inputs, outputs, *kernel]`
            if transposed), without its mask.
        mask: True where a weight survives, shaped like `weight`; None before any pruning.
        holders: every module that holds the weight, with the attribute it reads it from.
        is_first: the first prunable weight of the model in order of registration.
        is_last: the last one.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    mask: Tensor | None
    holders: tuple[tuple[nn.Module, str], ...]
    is_first: bool
    is_last: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return tuple(self.weight.shape)

    @property
    def size(self) -> int:
        """Number of weights, masked ones included."""
        return self.weight.numel()

    @property
    def remaining(self) -> int:
        """Number of weights that survive the mask."""
        return self.magnitudes.remaining

    @cached_property
    def magnitudes(self) -> Magnitudes:
        """|w| of the surviving weights."""
        return Magnitudes(self.weight, self.mask)

    @property
    def is_convolution(self) -> bool:
        """Whether the module is a convolution of any kind."""
        return isinstance(self.module, _ConvNd)

    @property
    def input_axis(self) -> int:
        """The axis of the weight that runs over inputs."""
        return 0 if isinstance(self.module, _ConvTransposeNd) else 1


def prunable_layers(model: nn.Module, ignored_layers: IgnoredLayers = ()) -> list[Layer]:
    """Every prunable weight of a model, in order of registration.

    Args:
        model: any module.
        ignored_layers: modules, or their qualified names, whose weights are left out,
            with all that they contain and all that shares a weight with them.

    Raises:
        ArgumentError: an ignored layer is not in the model, or a weight cannot be pruned
            as it is (lazy, computed by a parametrization, not real floating point).
        NothingToPruneError: no Linear or convolution is left.
    """
    ignored = _ignored(model, as_sequence(ignored_layers))
    for key, (name, _, weight) in _found(model).items():
        problem = None if key in ignored else _problem(weight)
        if problem:
            raise ArgumentError(
                f"the weight of layer {name!r} {problem}, or put the layer in ignored_layers"
            )
    layers = [layer for layer in readable_layers(model) if id(layer.weight) not in ignored]
    if not layers:
        raise NothingToPruneError(
            "no weight can be pruned: the model has no Linear or convolution outside "
            "ignored_layers; ignore fewer layers or leave this model dense"
        )
    return layers


def readable_layers(model: nn.Module) -> list[Layer]:
    """The prunable weights of a model, without those that cannot be pruned as they are."""
    found, holders = _found(model), _holders(model)
    order = list(found)
    return [
        Layer(
            name=name,
            module=module,
            weight=weight,
            mask=_mask(holders[key]),
            holders=tuple(holders[key]),
            is_first=key == order[0],
            is_last=key == order[-1],
        )
        for key, (name, module, weight) in found.items()
        if weight is not None and not _problem(weight) and weight.numel()
    ]


def as_sequence(ignored_layers: IgnoredLayers) -> Sequence[nn.Module | str]:
    """The entries; a single one may come without a list around it."""
    return [ignored_layers] if isinstance(ignored_layers, nn.Module | str) else [*ignored_layers]


def weight_count(model: nn.Module) -> int:
    """Number of prunable weights of a model, masked ones included, shared ones once.

    Before anything is pruned this is the `dense_weights` of :func:`compression_rate`.
    """
    return sum(layer.size for layer in readable_layers(model))


def compression_rate(model: nn.Module, dense_weights: int) -> float:
    """Share of the Linear and convolution weights that are gone, in [0, 1].

    Weights count as gone where they are masked, or absent because neurons were removed.
    After a structured share s and k iterations at rate r it is 1 - (1 - s)(1 - r)^k,
    the CR of NeuSemSlice's Table 4.

    Args:
        model: the pruned model, its masks not yet made permanent.
        dense_weights: `weight_count` of the model before any pruning.

    Raises:
        ArgumentError: the model has more weights left than `dense_weights`.
    """
    remaining = sum(layer.remaining for layer in readable_layers(model))
    if dense_weights < max(1, remaining):
        raise ArgumentError(
            f"dense_weights is {dense_weights}, but {remaining} weights are left: pass "
            "weight_count(model) as it was before any pruning"
        )
    return 1 - remaining / dense_weights


def check_finite(layers: Sequence[Layer]) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        NumericalError: names the first layer that has one.
    """
    for layer in layers:
        extremes = torch.aminmax(layer.weight.detach())  # NaN if any weight is
        if not all(math.isfinite(extreme) for extreme in extremes):
            raise NumericalError(
                f"the weight of layer {layer.name!r} has NaN or infinite values, which have "
                "no rank: repair the weights or put the layer in ignored_layers"
            )


def _found(model: nn.Module) -> dict[int, tuple[str, nn.Module, nn.Parameter | None]]:
    """Name, module and weight of each Linear and convolution, by the id of the weight.

    A weight that is not stored is None, by the id of its module.
    """
    found: dict[int, tuple[str, nn.Module, nn.Parameter | None]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd):
            weight = _stored_weight(module)
            found.setdefault(id(module if weight is None else weight), (name, module, weight))
    return found


def _stored_weight(module: nn.Module) -> nn.Parameter | None:
    if "weight_mask" in module._buffers and "weight_orig" in module._parameters:
        return module._parameters["weight_orig"]
    return module._parameters.get("weight")


def _problem(weight: nn.Parameter | None) -> str | None:
    """Why a weight cannot be pruned as it is, and what to do."""
    if weight is None:
        return (
            "is computed, not stored: remove its parametrization (weight norm, spectral norm, ...)"
        )
    if is_lazy(weight):
        return "has no shape yet: run one forward"
    if weight.dtype not in SUPPORTED_TYPES or weight.is_meta:
        allowed = ", ".join(str(kind).removeprefix("torch.") for kind in SUPPORTED_TYPES)
        return (
            f"is {weight.dtype} on {weight.device}: convert it to one of {allowed} on a device "
            "that holds data"
        )
    return None


def _ignored(model: nn.Module, ignored_layers: Sequence[nn.Module | str]) -> set[int]:
    """The keys of :func:`_found` to leave out."""
    members = set(model.modules())
    ignored: set[int] = set()
    for entry in ignored_layers:
        module = _resolve(model, entry) if isinstance(entry, str) else entry
        if module not in members:
            raise ArgumentError(
                f"ignored_layers has {entry!r}, which is not in the model: pass modules of "
                "this model or their names in model.named_modules()"
            )
        for child in module.modules():
            weight = _stored_weight(child)
            ignored.add(id(child if weight is None else weight))
    return ignored


def _resolve(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module and attribute from which each parameter, by its id, is read."""
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            attribute = key.removesuffix("_orig")
            if f"{attribute}_mask" not in module._buffers:
                attribute = key  # an original without a mask is not ours
            holders[id(parameter)].append((module, attribute))
    return holders


def _mask(holders: Sequence[tuple[nn.Module, str]]) -> Tensor | None:
    """What survives in every holder of a weight."""
    common: Tensor | None = None
    for module, attribute in holders:
        mask = module._buffers.get(f"{attribute}_mask")
        if mask is not None and f"{attribute}_orig" in module._parameters:
            mask = mask if mask.dtype == torch.bool else mask != 0
            common = mask if common is None or common is mask else common & mask
    return common
