"""Attributes that say how wide a module is, and must follow when its channels go.

Such as ``num_features`` and ``feature_info`` of timm's models, ``normalized_shape`` of a norm that
torch-pruning takes for a bare parameter, or the ``channels`` of a layer that groups them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from nss_prune.graph.axes import side_width
from nss_prune.graph.neurons import Side
from nss_prune.graph.slices import Slice
from nss_prune.structures.protocol import Change
from nss_prune.surgery.buffers import Producers, channels_given

OF_THE_HEAD = ("num_features", "head_hidden_size")  # what a classifier consumes
OF_THE_STEM = (
    "d_model", "dim", "embed_dim", "embed_dims", "hidden_dim", "hidden_size", "in_channels",
    "in_chs", "in_dim", "in_features", "in_planes", "inplanes", "input_dim", "n_embd", "width",
)  # fmt: skip
OF_THE_END = (
    "channels", "dim_out", "features", "num_channels", "num_filters", "out_channels", "out_chs",
    "out_dim", "out_features", "out_planes", "output_dim", "planes", "pre_logits_dim",
)  # fmt: skip
OF_A_PART = (
    "c", "c_", "chunk_size", "half", "hidden", "hidden_channels", "mid_channels", "split_size",
)  # fmt: skip
SHAPE = "normalized_shape"
FEATURES = "feature_info"
FOLLOWERS = {*OF_THE_HEAD, *OF_THE_STEM, *OF_THE_END, SHAPE, FEATURES}


@dataclass(frozen=True)
class _Width:
    """Channels on a side of a layer, before and after the removal."""

    layer: str
    side: Side
    before: int
    after: int


def width_changes(
    model: nn.Module, critical: Slice, producers: Producers | None = None
) -> Iterator[Change]:
    """The attributes that must follow when a slice is cut out of a model.

    An attribute with a known name follows where it equals the width of channels inside its module:
    all that are as wide must shrink alike, or its name must tell which of them is meant.

    Args:
        producers: See :mod:`nss_prune.surgery.buffers`.
    """
    yield from _part_changes(model, critical)
    widths = _widths(model, critical, producers or {})
    if all(width.before == width.after for width in widths):
        return
    layers = {width.layer for width in widths}
    head = _classifier(model)
    for path, module in model.named_modules():
        if side_width(module, "out", None) is not None:
            continue  # torch-pruning's functions change a layer's own
        followers = [(name, value) for name, value in vars(module).items() if name in FOLLOWERS]
        if not followers:
            continue
        inside = [width for width in widths if _lies_in(width.layer, path)]
        for name, value in followers:
            if name == FEATURES:
                yield from _feature_info(module, path, value, widths)
            elif name == SHAPE and path in layers and isinstance(value, tuple):
                new = _followed(name, value[-1], inside, head)
                if new != value[-1]:
                    yield Change(module, name, (*value[:-1], new))
            elif type(value) is int and name != SHAPE:
                new = _followed(name, value, inside, head)
                if new != value:
                    yield Change(module, name, new)


def _part_changes(model: nn.Module, critical: Slice) -> Iterator[Change]:
    """Numbers of channels of one part, where a layer's channels are cut into parts or a map.

    They are those of the modules around the layer, and of ``nn.Unflatten``.
    """
    parts = {
        group.name: (group.size, int(critical.kept[group.name].sum()))
        for group in critical.groups
        if group.followed and group.name in critical.removed
    }
    if not parts:
        return
    for path, module in model.named_modules():
        inside = {sizes for name, sizes in parts.items() if _lies_in(name, path)}
        after = dict(inside)
        if isinstance(module, nn.Unflatten):
            after = dict(parts.values())
            first, *others = module.unflattened_size
            if first in after:
                yield Change(module, "unflattened_size", (after[first], *others))
            continue
        for name in OF_A_PART:
            value = vars(module).get(name)
            if type(value) is int and value in after:
                yield Change(module, name, after[value])


def _widths(model: nn.Module, critical: Slice, producers: Producers) -> list[_Width]:
    """Of all layers that have channels, in the order of the modules."""
    removed = critical.removed_channels()
    apart = {group.name for group in critical.groups if not group.has_channels}
    of_heads = {
        (member.name, member.side)
        for group in critical.groups
        if group.name in apart
        for member in group.members
    }
    parameters = {  # module without layers -> its channels before and after
        member.name.rpartition(".")[0]: (member.width, member.width - len(channels))
        for member, channels in removed.values()
        if member.axis is not None
    }
    for name, (member, channels) in channels_given(critical, producers):
        parameters[name] = (member.width, member.width - len(channels))
    found = []
    for name, module in model.named_modules():
        if name in parameters and not module._modules:
            found.append(_Width(name, "both", *parameters[name]))
        sides: tuple[Side, ...] = ("in", "out")
        for side in sides:
            before = side_width(module, side, None)
            key = (name, side) if (name, side) in removed else (name, "both")
            gone = len(removed[key][1]) if key in removed else 0
            if before is not None and key not in of_heads:
                found.append(_Width(name, side, before, before - gone))
    return found


def _lies_in(layer: str, path: str) -> bool:
    return not path or layer == path or layer.startswith(f"{path}.")


def _classifier(model: nn.Module) -> str:
    """The name of the layer that a model of timm calls its classifier, or ""."""
    find = getattr(model, "get_classifier", None)
    head = find() if callable(find) else None
    return next((name for name, module in model.named_modules() if module is head), "")


def _followed(name: str, value: int, inside: list[_Width], head: str) -> int:
    """What an attribute becomes."""
    same = [width for width in inside if width.before == value]
    if not same:
        return value
    after = {width.after for width in same}
    if len(after) == 1:
        return after.pop()
    if name in OF_THE_HEAD:
        read = [width for width in same if width.layer == head and width.side == "in"]
        return (read or same)[-1].after
    made = [width for width in same if width.side != "in"] or same
    return made[0 if name in OF_THE_STEM else -1].after


def _feature_info(
    module: nn.Module, path: str, value: Any, widths: list[_Width]
) -> Iterator[Change]:
    """timm's list of what each stage gives: dicts with ``num_chs`` and ``module``."""
    if not isinstance(value, list) or not all(isinstance(stage, dict) for stage in value):
        return
    prefix = f"{path}." if path else ""
    order = [prefix + name for name, _ in module.named_modules()]
    changed = []
    for stage in value:
        name = prefix + str(stage.get("module", ""))
        made = [w for w in widths if w.side != "in" and w.before == stage.get("num_chs")]
        found = [width for width in made if _lies_in(width.layer, name)]
        if not found and name in order:  # an activation: what comes before it
            earlier = set(order[: order.index(name)])
            found = [width for width in made if width.layer in earlier]
        if not found and name in order:  # a concatenation: what consumes it
            later = set(order[order.index(name) :])
            read = [w for w in widths if w.side != "out" and w.before == stage.get("num_chs")]
            found = [width for width in reversed(read) if width.layer in later]
        changed.append({**stage, "num_chs": found[-1].after} if found else stage)
    if changed != value:
        yield Change(module, FEATURES, changed)
