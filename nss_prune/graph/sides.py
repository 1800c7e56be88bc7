"""The sides of layers on which channels lie, labelled while a call is followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nss_prune.core.arguments import input_of
from nss_prune.core.multihead import INPUTS, has_plain_heads, named_inputs
from nss_prune.core.nested import tensors_in
from nss_prune.errors import ArgumentError
from nss_prune.graph.axes import input_axis, is_depthwise, side_width
from nss_prune.graph.labels import Labels
from nss_prune.graph.neurons import Side
from nss_prune.graph.recurrent import directions, has_plain_units, internal_sides

CROSSES_ATTENTION = (
    "its channels are the width of an nn.MultiheadAttention, and no other layer consumes them"
)
OTHER_ATTENTION = (
    "its channels are the width of an nn.MultiheadAttention with add_bias_kv, add_zero_attn or a "
    "forward function of its own, which is not followed"
)
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class LabelledSide:
    """One side of a layer, or an axis of a bare parameter.

    Attributes:
        name, side, axis: As of a :class:`nss_prune.graph.neurons.Member`.
        labels: Of its channels, ``[channels]``.
    """

    name: str
    side: Side
    axis: int | None
    labels: Tensor


class Layer:
    """A layer whose sides are known; what it does inside is not followed."""

    def __init__(self, name: str, module: nn.Module, labels: Labels) -> None:
        self.name = name
        self.module = module
        self.labels = labels
        self.sides: list[LabelledSide] = []
        kind = _kind(module)
        self.read: Tensor | None = None
        if kind == "both":
            self.made = self._side("both", _width(module, "out"))
            self.read = self.made
            return
        if kind == "maps":
            self.read = self._side("in", _width(module, "in"))
        self.made = self._side("out", _width(module, "out"))
        if isinstance(module, nn.RNNBase):
            units = self.made.view(directions(module), -1)
            labels.join(units, units[:1].expand_as(units))
            for key, repeats in internal_sides(module):
                inside = self._side("in", module.hidden_size * repeats, f"{name}.{key}", 1)
                labels.join(inside.view(repeats, -1), units[:1].expand(repeats, -1))

    def _side(
        self, side: Side, width: int, name: str | None = None, axis: int | None = None
    ) -> Tensor:
        found = self.labels.new(width)
        self.sides.append(LabelledSide(name or self.name, side, axis, found))
        return found

    def attach(self) -> Iterator[RemovableHandle]:
        """Hooks that label what the layer reads and makes."""
        yield self.module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=False)
        yield self.module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        self.labels.resting += 1
        try:
            inputs = input_of(arguments, keywords)
        except ArgumentError:
            kinds = ", ".join(sorted({type(value).__name__ for value in arguments}))
            for labels in (self.made, *map(self.labels.of, tensors_in((arguments, keywords)))):
                self.labels.pin(labels, f"{self.name} is given a {kinds} and no plain tensor")
            return
        seen = self.labels.of(inputs)
        if seen is None or self.read is None:
            return
        axis = 1 if isinstance(module, (nn.GroupNorm, *NORMS)) else input_axis(module)
        by_channel = seen.movedim(axis, -1)
        self.labels.join(by_channel, self.read.expand_as(by_channel))
        states = [tensor for tensor in tensors_in((arguments, keywords)) if tensor is not inputs]
        for state in states if isinstance(module, nn.RNNBase) else ():
            its = self.labels.of(state)
            if its is not None:
                self.labels.join(its, self.made[: its.shape[-1]].expand_as(its))

    def _after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.labels.resting -= 1
        if isinstance(output, Tensor):
            axis = self._output_axis(output)
            self._label(output, self.made, axis)
        elif isinstance(module, nn.RNNBase) and isinstance(output[0], Tensor):
            outputs, *states = tensors_in(output)
            self._label(outputs, self.made, -1)
            for state in states:
                self._label(state, self.made[: module.hidden_size], -1)

    def _output_axis(self, output: Tensor) -> int:
        if isinstance(self.module, nn.modules.conv._ConvNd):
            return -1 - len(self.module.kernel_size)  # maps may come without samples
        return 1 if isinstance(self.module, (nn.GroupNorm, *NORMS)) else -1

    def _label(self, tensor: Tensor, labels: Tensor, axis: int) -> None:
        shape = [1] * tensor.dim()
        shape[axis] = len(labels)
        self.labels.put(tensor, labels.view(shape).expand(tensor.shape))


class OwnNorm(Layer):
    """A LayerNorm with a forward function of its own, followed inside: it may move the channels."""

    def __init__(self, name: str, module: nn.LayerNorm, labels: Labels) -> None:
        super().__init__(name, module, labels)
        labels.scales.add(id(module.weight))
        for value in (module.weight, module.bias):
            if value is not None:
                labels.put(value, self.made)

    def attach(self) -> Iterator[RemovableHandle]:
        """None: the labels are those of its parameters."""
        return iter(())


class AttentionLayer:
    """torch's attention by its width: what it is given, and what ``out_proj`` makes.

    Its heads are neurons apart (:mod:`nss_prune.structures.multihead`), named after ``out_proj``,
    so that those of the width have their name from another layer.
    """

    def __init__(self, name: str, module: nn.MultiheadAttention, labels: Labels) -> None:
        self.name = name
        self.module = module
        self.labels = labels
        fused = module.in_proj_weight is not None
        columns = {
            key: labels.new(module._parameters[key].shape[1])  # type: ignore[union-attr]
            for key in (("in_proj_weight",) if fused else SEPARATE)
        }
        made = labels.new(module.out_proj.out_features)
        self.sides = [LabelledSide(f"{name}.{key}", "in", 1, its) for key, its in columns.items()]
        self.sides.append(LabelledSide(f"{name}.out_proj", "out", None, made))
        self._read = [columns[key] for key in (("in_proj_weight",) * 3 if fused else SEPARATE)]
        self._made = made

    def attach(self) -> Iterator[RemovableHandle]:
        """Hooks that label what it is given and what it makes."""
        yield self.module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=False)
        yield self.module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        self.labels.resting += 1
        named = named_inputs(arguments, keywords)
        read = {name: named.pop(name) for name in INPUTS if name in named}
        for tensor, columns in zip(read.values(), self._read, strict=True):
            seen = self.labels.of(tensor)
            if seen is not None:
                self.labels.join(seen, columns.expand_as(seen))
        for tensor in tensors_in((arguments[3:], named)):
            self.labels.pin(self.labels.of(tensor), "its channels mask an nn.MultiheadAttention")

    def _after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.labels.resting -= 1
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            self.labels.put(output[0], self._made.expand(output[0].shape))


class WholeLayer:
    """A layer of which no channel can go: what it is given and what it makes stays.

    Args:
        reason: Why.
    """

    def __init__(self, name: str, module: nn.Module, labels: Labels, reason: str) -> None:
        self.name = name
        self.module = module
        self.labels = labels
        self.reason = reason
        self.sides: list[LabelledSide] = []
        width = side_width(module, "out", None)
        if width is not None and not isinstance(module, nn.MultiheadAttention):
            self.sides.append(LabelledSide(name, "out", None, labels.new(width)))
            labels.pin(self.sides[0].labels, reason)

    def attach(self) -> Iterator[RemovableHandle]:
        """Hooks that pin what the layer is given, and do not look inside."""
        yield self.module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=False)
        yield self.module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        self.labels.resting += 1
        for tensor in tensors_in((arguments, keywords)):
            self.labels.pin(self.labels.of(tensor), self.reason)

    def _after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.labels.resting -= 1


def _reason_to_stay_whole(name: str, module: nn.Module) -> str:
    """Why no channel of a layer can go, or ""."""
    if isinstance(module, nn.MultiheadAttention):
        return OTHER_ATTENTION
    if isinstance(module, nn.RNNBase) and not has_plain_units(module):
        return f"{name} projects its hidden units (proj_size), which is not followed"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        return "" if is_depthwise(module) else f"{name} ties channels in {module.groups} groups"
    return ""


def _kind(module: nn.Module) -> str:
    """What a layer does with channels: "maps" to others, "makes" them, passes "both" on, or ""."""
    if isinstance(module, nn.RNNBase):
        return "maps" if has_plain_units(module) else ""
    if isinstance(module, nn.modules.conv._ConvNd):
        if is_depthwise(module):
            return "both"
        return "maps" if module.groups == 1 else ""
    if isinstance(module, nn.Linear):
        return "maps"
    if isinstance(module, nn.Embedding):
        return "makes"
    if isinstance(module, NORMS):
        return "both" if module.affine or module.track_running_stats else ""
    if isinstance(module, nn.LayerNorm):
        return "both" if module.weight is not None and len(module.normalized_shape) == 1 else ""
    if isinstance(module, nn.GroupNorm):
        return "both" if module.affine and module.num_groups == 1 else ""
    return ""


def _width(module: nn.Module, side: Side) -> int:
    if isinstance(module, NORMS):
        return int(module.num_features)
    width = side_width(module, side, None)
    assert width is not None
    return width


AnyLayer = Layer | AttentionLayer | WholeLayer


def layers_of(model: nn.Module, labels: Labels) -> Iterator[AnyLayer]:
    """The layers of a model whose sides are known, or which stay whole, each once."""
    known: Callable[[nn.Module], str] = _kind
    inside = {part.out_proj for part in model.modules() if has_plain_heads(part)}
    for name, module in model.named_modules():
        if module in inside:
            continue
        if has_plain_heads(module):
            yield AttentionLayer(name, module, labels)
        elif known(module) and (type(module).__module__.startswith("torch.nn") or not _own(module)):
            yield Layer(name, module, labels)
        elif known(module) and isinstance(module, nn.LayerNorm):
            yield OwnNorm(name, module, labels)
        elif reason := _reason_to_stay_whole(name, module):
            yield WholeLayer(name, module, labels, reason)


def _own(module: nn.Module) -> bool:
    """Whether a user's own class does more than the layer of torch that it is derived from."""
    kinds = type(module).__mro__
    base: Any = next(kind for kind in kinds if kind.__module__.startswith("torch.nn"))
    return getattr(type(module), "forward", None) is not base.forward
