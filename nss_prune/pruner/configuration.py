"""The configuration of a Hugging Face model follows where its format can say what a step did.

``from_pretrained`` builds a model by its configuration, which knows one number of heads and one
width for all layers (or a list of them). New values are tried before they are taken: a model is
built by them, without memory, and must have the tensors that the smaller model has. Where it has
others, such as heads of another width, or where layers of one kind keep different numbers, the
configuration stays as it was and the report says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from nss_prune.graph.neurons import NeuronGroup
from nss_prune.graph.slices import Slice

HEADS = ("num_attention_heads", "num_key_value_heads")
HIDDEN = ("hidden_size", "d_model", "embed_dim")
BETWEEN = ("intermediate_size", "hidden_dim", "d_ff", "n_inner", "ffn_dim")
WIDTH = "head_dim"

LIMIT = (
    "the configuration cannot say what is left ({why}): save with nss_prune.save_pruned, and load "
    "with nss_prune.load_pruned into a model of the old configuration, not with from_pretrained"
)


def follow_configuration(model: nn.Module, chosen: Slice) -> tuple[str, ...]:
    """Let the configuration of a pruned model follow; the notes of what it cannot say.

    Args:
        chosen: What was kept, of the groups before the step.
    """
    config = getattr(model, "config", None)
    if not (hasattr(model, "save_pretrained") and hasattr(config, "to_dict")):
        return ()
    if not chosen.removed:
        return ()
    new, why = _new_values(config, chosen)
    if why:
        return (LIMIT.format(why=why),)
    for values in (new, {**new, **_head_widths(config, chosen)}):
        if _builds(model, _with_values(config, values)):
            _set_everywhere(model, config, values)
            return ()
    return (LIMIT.format(why=f"a model with {_shown(new)} has other tensors"),)


def _new_values(config: Any, chosen: Slice) -> tuple[dict[str, Any], str]:
    """Field -> its value after the step, and why there is none, or ""."""
    new: dict[str, Any] = {}
    for fields, groups in (
        (HEADS, [group for group in chosen.groups if _has_heads(group)]),
        (HIDDEN, [group for group in chosen.groups if _is_trunk(group)]),
        (BETWEEN, [g for g in chosen.groups if not (_has_heads(g) or _is_trunk(g))]),
    ):
        for field in _known(config, fields):
            value = getattr(config, field)
            left = _left(value, groups, chosen)
            if left is None:
                kept = sorted({int(chosen.kept[group.name].sum()) for group in groups})
                return {}, f"one {field} for layers that keep {', '.join(map(str, kept))}"
            if left != value:
                new[field] = left
    return new, ""


def _left(value: Any, groups: list[NeuronGroup], chosen: Slice) -> Any:
    """What a field becomes; None where its layers keep different numbers."""
    if isinstance(value, list) and len(value) == len(groups):
        return [_after(one, group, chosen) for one, group in zip(value, groups, strict=True)]
    listed = isinstance(value, list)
    found = []
    for one in value if listed else [value]:
        sizes = {_after(one, group, chosen) for group in groups if _counts(one, group, listed)}
        if len(sizes) > 1:
            return None
        found.append(sizes.pop() if sizes else one)
    return found if listed else found[0]


def _counts(value: int, group: NeuronGroup, exactly: bool) -> bool:
    """Whether a field may be about a group: its channels, or its heads or those of a key."""
    if _has_heads(group) and not exactly:
        return value % group.size == 0
    if _has_heads(group):
        return value == group.size
    return value == group.size * group.ties


def _after(value: int, group: NeuronGroup, chosen: Slice) -> int:
    return int(chosen.kept[group.name].sum()) * value // group.size


def _has_heads(group: NeuronGroup) -> bool:
    return not group.has_channels


def _is_trunk(group: NeuronGroup) -> bool:
    """Whether neurons go through several layers, as those of a residual stream do."""
    return group.has_channels and len(group.consumers) > 1


def _known(config: Any, fields: tuple[str, ...]) -> Iterator[str]:
    """The fields that a configuration has, each once."""
    names = dict(getattr(config, "attribute_map", None) or {})
    seen = set()
    for field in fields:
        name = names.get(field, field)
        value = getattr(config, field, None)
        numbers = value if isinstance(value, list) else [value]
        if name not in seen and numbers and all(type(number) is int for number in numbers):
            seen.add(name)
            yield field


def _head_widths(config: Any, chosen: Slice) -> dict[str, int]:
    """The width of a head, said in words where it was the hidden size by the number of heads."""
    heads = getattr(config, HEADS[0], None)
    hidden = getattr(config, HIDDEN[0], None)
    if not (isinstance(heads, int) and isinstance(hidden, int)):
        return {}
    return {WIDTH: hidden // heads} if any(map(_has_heads, chosen.groups)) else {}


def _with_values(config: Any, values: Mapping[str, Any]) -> Any:
    made = copy.deepcopy(config)
    for name, value in values.items():
        setattr(made, name, value)
    return made


def _builds(model: nn.Module, config: Any) -> bool:
    """Whether a model made by a configuration has the tensors of this one."""
    try:
        with torch.device("meta"):
            made = type(model)(config)
    except Exception:  # whatever a class raises that does not take such a configuration
        return False
    return _shapes(made) == _shapes(model)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def _set_everywhere(model: nn.Module, config: Any, values: Mapping[str, Any]) -> None:
    """In the model's configuration, and in the copies of it that parts of a model may have."""
    before = {name: getattr(config, name, None) for name in values}
    found = (vars(module).get("config") for module in model.modules())
    copies = {id(own): own for own in found if type(own) is type(config)}
    for own in {id(config): config, **copies}.values():
        for name, value in values.items():
            if getattr(own, name, None) == before[name]:
                setattr(own, name, value)


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "its values"
