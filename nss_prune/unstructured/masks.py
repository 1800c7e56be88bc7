"""Masks on weights, in the form that torch.nn.utils.prune gives them.

A masked weight is the parameter `weight_orig`, the buffer `weight_mask` and a hook that
computes `weight` from both before every forward: what `prune.custom_from_mask` makes, so
that `prune.is_pruned`, `prune.remove` and further pruning by torch work. Three things
differ. The mask is boolean and there is one hook however often it is refined, so that a
masked weight takes one and a quarter more copies instead of two and more. Whatever shares
the parameter is masked with it. And modules that read the weight of a child without calling
it (`nn.MultiheadAttention`, Swin, BEiT) have it computed before their own forward too.

No optimizer can bring a masked weight back: it is zero whatever `weight_orig` holds, and it
gets no gradient, whatever momentum and weight decay do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from nss_prune.unstructured.weights import Layer, readable_layers

_UNCALLED = (nn.ModuleList, nn.ModuleDict)  # have no forward: who holds them calls their members
_SEEN_THROUGH = (*_UNCALLED, nn.MultiheadAttention)  # nn.TransformerEncoderLayer reads its weights


class MaskedWeight(prune.BasePruningMethod):
    """The hook that computes a module's masked weight.

    Args:
        attribute: the attribute that the module reads its weight from.
    """

    PRUNING_TYPE = "unstructured"

    def __init__(self, attribute: str) -> None:
        self._tensor_name = attribute

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask as it is: it is made outside."""
        return default_mask

    def apply_mask(self, module: nn.Module) -> Tensor:
        """The weight, exactly zero where it is masked; keeps no float copy of the mask."""
        original = module.get_parameter(f"{self._tensor_name}_orig")
        return torch.where(module.get_buffer(f"{self._tensor_name}_mask"), original, 0)


def set_masks(model: nn.Module, masks: Mapping[Layer, Tensor | None]) -> None:
    """Give layers these masks, all or, if that fails, none.

    Args:
        model: the model that the layers are of.
        masks: True where a weight survives, shaped like the weight, on its device; None
            takes a layer's mask off and its original weights come back.
    """
    changed = []
    try:
        for layer, mask in masks.items():
            changed.append(layer)
            _set_mask(layer, mask)
    except BaseException:
        for layer in changed:
            _set_mask(layer, layer.mask)
        raise
    finally:
        _hook_readers(model)


def make_permanent(model: nn.Module) -> None:
    """Write the zeros into the weights and take their masks off: `prune.remove` for a model.

    It is for the weights of Linear layers and convolutions. The masked weights' original
    values are lost, and nothing keeps them zero any more.
    """
    layers = readable_layers(model)
    with torch.no_grad():
        for layer in layers:
            if layer.mask is not None:
                layer.weight.masked_fill_(~layer.mask, 0)
    set_masks(model, dict.fromkeys(layers))


def refresh(model: nn.Module) -> None:
    """Compute every masked weight now, outside autograd.

    Every forward does it; needed only to read `weight` right after an optimizer step, or
    before `copy.deepcopy`, which refuses a weight that autograd has made.
    """
    with torch.no_grad():
        for module in model.modules():
            _compute(module)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The bool masks of a model by qualified name of the layer; unmasked layers are left out."""
    return {layer.name: layer.mask for layer in readable_layers(model) if layer.mask is not None}


def _set_mask(layer: Layer, mask: Tensor | None) -> None:
    for module, attribute in layer.holders:
        _drop_hooks(module, attribute)
        module.__dict__.pop(attribute, None)  # frees the old product before the new is made
        if mask is None:
            module._buffers.pop(f"{attribute}_mask", None)
            _rename(module._parameters, f"{attribute}_orig", attribute)
        else:
            _rename(module._parameters, attribute, f"{attribute}_orig")
            module.register_buffer(f"{attribute}_mask", mask)
            hook = MaskedWeight(attribute)
            with torch.no_grad():
                hook(module, ())
            module.register_forward_pre_hook(hook)


def _drop_hooks(module: nn.Module, attribute: str) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == attribute:
            del module._forward_pre_hooks[key]


def _rename(entries: MutableMapping[str, Any], old: str, new: str) -> None:
    """Rename an entry in its place: optimizers know parameters by their order."""
    renamed = [(new if key == old else key, value) for key, value in entries.items()]
    entries.clear()
    entries.update(renamed)


def _compute(module: nn.Module) -> None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(module, ())


def _compute_children(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    for child in _children(module):
        _compute(child)


def _children(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose weights a forward may well read without calling them."""
    for child in module.children():
        if isinstance(child, _SEEN_THROUGH):
            yield from _children(child)
        else:
            yield child


def _hook_readers(model: nn.Module) -> None:
    """Hook the modules that could read a masked child's weight without calling the child."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _compute_children]:
            del hooks[key]
        if _reads_masked_children(module):
            module.register_forward_pre_hook(_compute_children)


def _reads_masked_children(module: nn.Module) -> bool:
    if isinstance(module, _UNCALLED) or type(module).forward is nn.Sequential.forward:
        return False
    return any(
        isinstance(hook, MaskedWeight)
        for child in _children(module)
        for hook in child._forward_pre_hooks.values()
    )
