"""Carry a removal plan out with torch-pruning's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from nss_prune.core.models import submodule
from nss_prune.errors import RemovalError
from nss_prune.graph.recurrent import RecurrentPruner
from nss_prune.graph.ties import shared_parameters
from nss_prune.surgery.plan import Step

Pruners = Mapping[Any, Any]

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Axes of a tensor -> how its values lie in memory when channels come last."""


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


def _pruning_function(module: nn.Module, customized: Pruners) -> Any:
    """torch-pruning's functions for one module, the caller's own first."""
    if module in customized:
        return customized[module]
    if type(module) in customized:
        return customized[type(module)]
    if isinstance(module, nn.RNNBase):
        return RecurrentPruner()
    kind = tp.ops.module2type(module)
    if kind == tp.ops.OPTYPE.LN:
        return LayerNormPruner()
    return tp.pruner.function.PrunerBox[kind]


def execute(model: nn.Module, steps: tuple[Step, ...], customized: Pruners) -> None:
    """Carry a plan out. On an error the model is left half done: see ``undone_on_error``.

    Raises:
        RemovalError: Two layers share a parameter, and would not any more.
    """
    shared = shared_parameters(model)
    channels_last = _channels_last(model)
    # Chosen before anything shrinks: a grouped convolution may come to look like a depthwise one.
    functions = {
        step.member.name: _pruning_function(submodule(model, step.member.name), customized)
        for step in steps
        if step.member.axis is None
    }
    for step in steps:
        name, indices = step.member.name, step.channels.tolist()
        if step.member.axis is not None:
            _shrink_parameter(model, step)
            continue
        module = submodule(model, name)
        flags = {key: value.requires_grad for key, value in module.named_parameters()}
        function = functions[name]
        before = dict(module._parameters)
        if step.member.side == "in":
            function.prune_in_channels(module, indices)
        else:
            function.prune_out_channels(module, indices)
            _shrink_others(module, before, step)
        for key, value in module.named_parameters():
            value.requires_grad_(flags[key])
    for names in shared:
        _tie_again(model, names)
    _as_before(model, channels_last)


def _channels_last(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those whose values lie channels_last in memory."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() in FORMATS
        and not parameter.is_contiguous()
        and parameter.is_contiguous(memory_format=FORMATS[parameter.dim()])
    }


def _as_before(model: nn.Module, channels_last: Mapping[str, nn.Parameter]) -> None:
    """Let new parameters lie channels_last in memory where the old ones did."""
    for name, old in channels_last.items():
        new = model.get_parameter(name)
        if new is not old:
            new.data = new.data.contiguous(memory_format=FORMATS[new.dim()])


def _tie_again(model: nn.Module, names: Sequence[str]) -> None:
    """Make parameters that were one tensor a single one again."""
    places = [
        (submodule(model, name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names
    ]
    first, *others = (module._parameters[key] for module, key in places)
    assert first is not None
    for name, other in zip(names[1:], others, strict=True):
        assert other is not None
        if other is not first and not (other.shape == first.shape and torch.equal(other, first)):
            raise RemovalError(
                f"{names[0]} and {name} are one tensor, which would part; name their layers in "
                "ignored_layers, or give each a parameter of its own"
            )
    for module, key in places[1:]:
        module._parameters[key] = first


def _shrink_others(
    module: nn.Module, before: Mapping[str, nn.Parameter | None], step: Step
) -> None:
    """Shrink the parameters of a layer of a user's own class that torch-pruning does not know."""
    for name, parameter in before.items():
        if parameter is None or module._parameters.get(name) is not parameter:
            continue
        if parameter.dim() and parameter.shape[0] == step.member.width:
            where = _kept(step.member.width, step.channels).to(parameter.device)
            smaller = parameter.detach().index_select(0, where)
            setattr(module, name, nn.Parameter(smaller, parameter.requires_grad))


def _kept(width: int, channels: Tensor) -> Tensor:
    stays = torch.ones(width, dtype=torch.bool)
    stays[channels] = False
    return stays.nonzero().flatten()


def _shrink_parameter(model: nn.Module, step: Step) -> None:
    parent_name, _, name = step.member.name.rpartition(".")
    parent, axis = submodule(model, parent_name), step.member.axis or 0
    parameter = getattr(parent, name)
    where = _kept(parameter.shape[axis], step.channels).to(parameter.device)
    smaller = parameter.detach().index_select(axis, where)
    setattr(parent, name, nn.Parameter(smaller, parameter.requires_grad))
